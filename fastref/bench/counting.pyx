"""Requests to callgrind, in which nothing happens outside of it: count from here, write down what was counted."""

cdef extern from *:
    """
    #if defined(__has_include)
    #if __has_include(<valgrind/callgrind.h>)
    #include <valgrind/callgrind.h>
    #define FR_CAN_COUNT 1
    #endif
    #endif
    #ifndef FR_CAN_COUNT
    #define FR_CAN_COUNT 0
    #define RUNNING_ON_VALGRIND 0
    #define CALLGRIND_START_INSTRUMENTATION
    #define CALLGRIND_STOP_INSTRUMENTATION
    #define CALLGRIND_ZERO_STATS
    #define CALLGRIND_DUMP_STATS_AT(name) ((void) (name))
    #endif

    static inline int fr_counted(void) { return RUNNING_ON_VALGRIND != 0; }
    static inline void fr_start_counting(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
    static inline void fr_stop_counting(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
    """
    enum: FR_CAN_COUNT
    int fr_counted()
    void fr_start_counting()
    void fr_stop_counting(const char* name)

__all__ = ["CAN_COUNT", "count", "is_counted"]

CAN_COUNT = bool(FR_CAN_COUNT)  # whether callgrind's header was there when this was compiled


def is_counted() -> bool:
    """Tell whether this process runs under valgrind."""
    return fr_counted() != 0


def count(str name, operation) -> None:
    """Call ``operation`` while callgrind counts, and have it write down the sum under a name.

    Parameters
    ----------
    name : str
        ASCII.
    operation : callable
        Called without arguments.
    """
    cdef bytes encoded = name.encode("ascii")
    cdef const char* text = encoded
    fr_start_counting()
    operation()
    fr_stop_counting(text)
