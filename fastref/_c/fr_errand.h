/* Errands: what takes long and nobody waits for, done in turn by one thread of the process.
 *
 * The thread is made when there is something to do and ends when there has been nothing for a while. It runs no Python
 * and takes no signals. A forked child has none of it: what waited there is its parent's to do, and a thread of its own
 * is made on demand. After `fr_errands_stop` nothing is taken any more, and whoever asks does it in place. */
#ifndef FR_ERRAND_H
#define FR_ERRAND_H

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <time.h>

#include "fr_atomic.h"

#define FR_ERRANDS_LINGER_NS 1000000000 /* how long the thread waits for another errand before it ends */

struct fr_errand {
    struct fr_errand *next;
    void (*run)(struct fr_errand *);  /* the errand's memory is its own to free */
};

struct fr_errands {
    pthread_mutex_t lock;             /* the fields below; nothing is called and nothing else locked under it */
    pthread_cond_t changed;
    struct fr_errand *first, **last;
    uint32_t running;                 /* there is a thread; read without the lock as a hint */
    int closed;
    uint64_t done;
    int64_t (*idle)(int64_t now_ns);  /* called when nothing waits: does what is due; when to be called again, or -1 */
};

static inline void *fr_errands_thread(void *argument)
{
    struct fr_errands *errands = argument;
    int lingers = 0;
    prctl(PR_SET_NAME, "fastref-errands");
    pthread_mutex_lock(&errands->lock);
    for (;;) {
        struct fr_errand *errand = errands->first;
        if (errand) {
            errands->first = errand->next;
            if (!errands->first)
                errands->last = &errands->first;
            pthread_mutex_unlock(&errands->lock);
            errand->run(errand);
            lingers = 0;
            pthread_mutex_lock(&errands->lock);
            errands->done++;
            continue;
        }
        if (errands->closed)
            break;
        pthread_mutex_unlock(&errands->lock);
        int64_t now = fr_now_ns(), due = errands->idle ? errands->idle(now) : -1;
        pthread_mutex_lock(&errands->lock);
        if (errands->first || errands->closed)
            continue;
        if (due < 0) {
            if (lingers)
                break;
            due = now + FR_ERRANDS_LINGER_NS;
        }
        lingers = 1;
        struct timespec until = {due / 1000000000, due % 1000000000};
        pthread_cond_timedwait(&errands->changed, &errands->lock, &until);
    }
    fr_store32_relaxed(&errands->running, 0); /* relaxed: the lock is held; others read a hint */
    pthread_cond_broadcast(&errands->changed);
    pthread_mutex_unlock(&errands->lock);
    return NULL;
}

/* Under the lock. False when there is no thread and none can be made. */
static inline int fr_errands_have_thread(struct fr_errands *errands)
{
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    int failed;
    if (errands->closed)
        return 0;
    if (errands->running)
        return 1;
    if (pthread_attr_init(&attributes))
        return 0;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    failed = pthread_create(&thread, &attributes, fr_errands_thread, errands);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    fr_store32_relaxed(&errands->running, !failed); /* relaxed: as above */
    return !failed;
}

/* Have the thread do something. False when the caller has to do it. */
static inline int fr_errands_post(struct fr_errands *errands, struct fr_errand *errand)
{
    int posted;
    pthread_mutex_lock(&errands->lock);
    posted = fr_errands_have_thread(errands);
    if (posted) {
        errand->next = NULL;
        *errands->last = errand;
        errands->last = &errand->next;
        pthread_cond_signal(&errands->changed);
    }
    pthread_mutex_unlock(&errands->lock);
    return posted;
}

/* Take back an errand that the thread has not begun. False when it has, or never had it; the errand need not exist then. */
static inline int fr_errands_take_back(struct fr_errands *errands, struct fr_errand *errand)
{
    struct fr_errand **at;
    int found = 0;
    pthread_mutex_lock(&errands->lock);
    for (at = &errands->first; *at && *at != errand; at = &(*at)->next)
        ;
    if (*at) {
        found = 1;
        *at = errand->next;
        if (errands->last == &errand->next)
            errands->last = at;
    }
    pthread_mutex_unlock(&errands->lock);
    return found;
}

/* Make sure that `idle` is called. False when it will not be. */
static inline int fr_errands_attend(struct fr_errands *errands)
{
    int attended;
    if (fr_load32_relaxed(&errands->running)) /* relaxed: a hint; one that has just ended is made again by the next */
        return 1;
    pthread_mutex_lock(&errands->lock);
    attended = fr_errands_have_thread(errands);
    pthread_mutex_unlock(&errands->lock);
    return attended;
}

/* Wait until all that was posted is done; from here on nothing is taken. */
static inline void fr_errands_stop(struct fr_errands *errands)
{
    pthread_mutex_lock(&errands->lock);
    errands->closed = 1;
    pthread_cond_broadcast(&errands->changed);
    while (errands->running)
        pthread_cond_wait(&errands->changed, &errands->lock);
    pthread_mutex_unlock(&errands->lock);
}

static inline void fr_errands_begin(struct fr_errands *errands)
{
    pthread_condattr_t attributes;
    pthread_mutex_init(&errands->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&errands->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    errands->first = NULL;
    errands->last = &errands->first;
    errands->running = 0;
}

/* To be called before fork() and, in the parent, after it; the child begins anew. */
static inline void fr_errands_before_fork(struct fr_errands *errands) { pthread_mutex_lock(&errands->lock); }
static inline void fr_errands_after_fork(struct fr_errands *errands) { pthread_mutex_unlock(&errands->lock); }

#endif
