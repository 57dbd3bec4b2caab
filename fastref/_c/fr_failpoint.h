/* Named places at which a test may kill, stop, delay or fail the process. Off: one predictable branch.
 *
 * FASTREF_FAILPOINTS="ring.reserved=kill:1;fork.received=stop:0.5" arms them: kill:N at the Nth passage, stop:S stops
 * the process (SIGSTOP) at the first passage and has a helper child continue it after S seconds, delay:S sleeps at
 * every passage. fail:N has what is tried there fail from the Nth time on; only places that ask (FR_FAILS) can fail. */
#ifndef FR_FAILPOINT_H
#define FR_FAILPOINT_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FR_FAILPOINT_MAX 64
struct fr_failpoint {
    char name[48];
    char action;    /* 'k' kill, 's' stop, 'd' delay, 'f' fail */
    double amount;  /* passage number for kill and fail, seconds otherwise */
    unsigned passed;
};
/* One copy for the whole process: every extension module finds it through the pointer that _core exports. */
struct fr_failpoints {
    int count;
    struct fr_failpoint point[FR_FAILPOINT_MAX];
};

/* Parse the text; returns the number of armed points, or -1 when it cannot be understood. */
static inline int fr_failpoints_parse(struct fr_failpoints *all, const char *text)
{
    char copy[4096], *rest = copy, *item;
    all->count = 0;
    if (text == NULL || !*text)
        return 0;
    if (strlen(text) >= sizeof copy)
        return -1;
    strcpy(copy, text);
    while ((item = strsep(&rest, ";")) != NULL) {
        struct fr_failpoint *p = &all->point[all->count];
        char *equals = strchr(item, '='), *colon = equals ? strchr(equals, ':') : NULL;
        if (!*item)
            continue;
        if (!colon || all->count == FR_FAILPOINT_MAX || (size_t)(equals - item) >= sizeof p->name)
            return -1;
        *equals = *colon = 0;
        strcpy(p->name, item);
        p->action = equals[1];
        p->amount = atof(colon + 1);
        p->passed = 0;
        if (strcmp(equals + 1, "kill") && strcmp(equals + 1, "stop") && strcmp(equals + 1, "delay")
            && strcmp(equals + 1, "fail"))
            return -1;
        all->count++;
    }
    return all->count;
}

static inline struct timespec fr_failpoint_time(double seconds)
{
    struct timespec t = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    return t;
}

static inline void fr_failpoint_stop(double seconds)
{
    struct timespec pause = fr_failpoint_time(seconds);
    pid_t me = getpid(), child = fork();
    if (child < 0)
        return;
    if (child == 0) {
        while (getppid() == me) { /* again and again: the first SIGCONT may come before the stop */
            nanosleep(&pause, NULL);
            kill(me, SIGCONT);
        }
        _exit(0);
    }
    syscall(SYS_tgkill, me, syscall(SYS_gettid), SIGSTOP); /* to this very thread: it does not get past this line before */
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

/* Do what is armed for a place; 1 when it is to fail. */
static __attribute__((noinline, cold, unused)) int fr_failpoint_hit(struct fr_failpoints *all, const char *name)
{
    int fails = 0;
    for (int i = 0; i < all->count; i++) {
        struct fr_failpoint *p = &all->point[i];
        unsigned passage;
        struct timespec pause;
        if (strcmp(p->name, name))
            continue;
        passage = __atomic_add_fetch(&p->passed, 1, __ATOMIC_SEQ_CST);
        switch (p->action) {
        case 'k':
            if (passage == (unsigned)p->amount)
                kill(getpid(), SIGKILL);
            break;
        case 's':
            if (passage == 1)
                fr_failpoint_stop(p->amount);
            break;
        case 'd':
            pause = fr_failpoint_time(p->amount);
            nanosleep(&pause, NULL);
            break;
        case 'f':
            fails |= passage >= (unsigned)p->amount;
        }
    }
    return fails;
}

/* Each extension module points this at the one copy, which _core owns, when it is imported. */
static struct fr_failpoints *fr_failpoints_here __attribute__((unused));

#define FR_FAILPOINT(name)                                                                 \
    do {                                                                                   \
        if (__builtin_expect(fr_failpoints_here != NULL && fr_failpoints_here->count, 0))  \
            fr_failpoint_hit(fr_failpoints_here, (name));                                  \
    } while (0)

/* True when what is tried here is to fail. */
#define FR_FAILS(name) \
    (__builtin_expect(fr_failpoints_here != NULL && fr_failpoints_here->count, 0) \
     && fr_failpoint_hit(fr_failpoints_here, (name)))

#endif
