"""torch's own tests of ``torch.distributed.rpc``, run against fastref."""
