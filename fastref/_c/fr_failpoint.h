/* Named places at which a test may kill, stop or delay the process. Off: one predictable branch.
 *
 * FASTREF_FAILPOINTS="ring.commit=kill:1;fork.receive=stop:0.5" arms them: kill:N at the Nth passage,
 * stop:S stops the process (SIGSTOP) and lets a helper child continue it after S seconds, delay:S sleeps. */
#ifndef FR_FAILPOINT_H
#define FR_FAILPOINT_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FR_FAILPOINT_MAX 16
struct fr_failpoint {
    char name[48];
    char action;    /* 'k' kill, 's' stop, 'd' delay */
    double amount;  /* passage number for kill, seconds otherwise */
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
    char copy[1024], *rest = copy, *item;
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
        if (strcmp(equals + 1, "kill") && strcmp(equals + 1, "stop") && strcmp(equals + 1, "delay"))
            return -1;
        all->count++;
    }
    return all->count;
}

static __attribute__((noinline, cold, unused)) void fr_failpoint_hit(struct fr_failpoints *all, const char *name)
{
    for (int i = 0; i < all->count; i++) {
        struct fr_failpoint *p = &all->point[i];
        unsigned passage;
        if (strcmp(p->name, name))
            continue;
        passage = __atomic_add_fetch(&p->passed, 1, __ATOMIC_SEQ_CST);
        if (p->action == 'k' && passage == (unsigned)p->amount) {
            kill(getpid(), SIGKILL);
        } else if (p->action == 's' && passage == 1) {
            pid_t me = getpid(), child = fork();
            if (child == 0) {
                struct timespec t = {(time_t)p->amount, (long)((p->amount - (time_t)p->amount) * 1e9)};
                nanosleep(&t, NULL);
                kill(me, SIGCONT);
                _exit(0);
            }
            kill(me, SIGSTOP);
            if (child > 0)
                waitpid(child, NULL, 0);
        } else if (p->action == 'd') {
            struct timespec t = {(time_t)p->amount, (long)((p->amount - (time_t)p->amount) * 1e9)};
            nanosleep(&t, NULL);
        }
    }
}

/* Each extension module points this at the one copy, which _core owns, when it is imported. */
static struct fr_failpoints *fr_failpoints_here __attribute__((unused));

#define FR_FAILPOINT(name)                                                                 \
    do {                                                                                   \
        if (__builtin_expect(fr_failpoints_here != NULL && fr_failpoints_here->count, 0))  \
            fr_failpoint_hit(fr_failpoints_here, (name));                                  \
    } while (0)

#endif
