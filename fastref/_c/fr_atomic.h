/* Atomic operations, the clock and the futex: everything else in this folder is built from these.
 *
 * All words live in memory that other processes may write at any time, so every access goes through
 * __atomic builtins; there is no plain read of a shared word anywhere. */
#ifndef FR_ATOMIC_H
#define FR_ATOMIC_H

#include <errno.h>
#include <linux/futex.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FR_INLINE static inline __attribute__((always_inline))

FR_INLINE uint64_t fr_load_relaxed(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
FR_INLINE uint64_t fr_load_acquire(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
FR_INLINE void fr_store_relaxed(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
FR_INLINE void fr_store_release(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
FR_INLINE uint64_t fr_add_relaxed(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
FR_INLINE uint64_t fr_add(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
FR_INLINE uint64_t fr_or(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
FR_INLINE uint64_t fr_and(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
FR_INLINE uint64_t fr_exchange(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
FR_INLINE int fr_cas(uint64_t *p, uint64_t from, uint64_t to)
{
    return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

FR_INLINE uint32_t fr_load32_relaxed(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
FR_INLINE uint32_t fr_load32_acquire(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
FR_INLINE void fr_store32_relaxed(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
FR_INLINE void fr_store32_release(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
FR_INLINE uint32_t fr_add32(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
FR_INLINE uint32_t fr_exchange32(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
FR_INLINE int fr_cas32(uint32_t *p, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

#if defined(__SANITIZE_THREAD__)
/* Thread sanitizer does not understand fences; a dummy read-modify-write orders the same for it. */
static uint32_t fr_fence_word;
FR_INLINE void fr_fence(void) { __atomic_fetch_add(&fr_fence_word, 0, __ATOMIC_SEQ_CST); }
FR_INLINE void fr_fence_acquire(void) { __atomic_fetch_add(&fr_fence_word, 0, __ATOMIC_ACQUIRE); }
#else
FR_INLINE void fr_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
FR_INLINE void fr_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
#endif

FR_INLINE void fr_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* The processor that runs this thread now; a few nanoseconds where the C library has restartable sequences. */
extern int sched_getcpu(void);
FR_INLINE uint32_t fr_cpu(void) { return (uint32_t)sched_getcpu(); }
#define FR_NO_CPU 0xfffffffeu

/* CLOCK_MONOTONIC in nanoseconds: one clock for all processes of a host, so deadlines travel as they are. */
FR_INLINE int64_t fr_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Sleep while *word == expected, at most timeout_ns (negative: for ever). Not the private kind: the
 * words lie in shared memory. Returns 0 when woken or the word differed, or errno (ETIMEDOUT, EINTR). */
static inline int fr_futex_wait(uint32_t *word, uint32_t expected, int64_t timeout_ns)
{
    struct timespec t, *limit = NULL;
    if (timeout_ns >= 0) {
        t.tv_sec = timeout_ns / 1000000000;
        t.tv_nsec = timeout_ns % 1000000000;
        limit = &t;
    }
    if (syscall(SYS_futex, word, FUTEX_WAIT, expected, limit, NULL, 0) == 0 || errno == EAGAIN)
        return 0;
    return errno;
}

static inline void fr_futex_wake(uint32_t *word, int threads)
{
    syscall(SYS_futex, word, FUTEX_WAKE, threads, NULL, NULL, 0);
}

#endif
