"""How one large buffer crosses to a peer: lend, borrow, give back.

    lend        the sender has a place filled; the descriptor says where, and is small enough for a frame
    borrow      the receiver reads the place; it cannot write there
    give_back   the sender learns that nobody reads the place any more, and may use it again

A place that is lent does not change until it is given back. A descriptor from a peer is checked before it is used.
The sender's bookkeeping is private memory: no receiver, alive or killed, can leave it broken.
"""
