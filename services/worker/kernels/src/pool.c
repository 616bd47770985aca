/* The thread pool: the caller and num_threads - 1 helpers share the items of one region.
 *
 * Items are claimed one by one from an atomic ticket, never dealt out in advance, so a thread
 * that the system takes off its core (two workers on two cores) holds up one item, not half
 * the work:
 *
 *     ticket  [ region number : 32 | next item : 32 ]      compare-and-swap to claim
 *
 * The region number is what makes late helpers harmless: one that wakes up after its region is
 * over fails its swap, so the caller waits for claimed items only, never for sleeping threads.
 *
 * Waiting threads spin for some 30 us (the gap between two kernels of a layer), then sleep on
 * a condition variable, so an idle worker costs nothing.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "kernels.h"

enum { SPIN_ITERATIONS = 1000, CACHE_LINE_BYTES = 64 };

struct helper {
    struct pool *pool;
    pthread_t thread;
    int index;
};

struct pool {
    _Alignas(CACHE_LINE_BYTES) _Atomic uint64_t ticket;
    _Alignas(CACHE_LINE_BYTES) _Atomic int64_t num_items;
    pool_task task;
    const void *context;
    _Alignas(CACHE_LINE_BYTES) _Atomic int64_t num_done;
    _Alignas(CACHE_LINE_BYTES) _Atomic int num_sleeping;
    _Atomic bool caller_sleeping, closing;
    pthread_mutex_t lock, region_lock;
    pthread_cond_t work_arrived, region_finished;
    int num_threads;
    char *scratch;
    struct helper helpers[];
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Claims the next item of the current region; false when there is none. */
static bool claim(struct pool *pool, int64_t *item) {
    uint64_t ticket = atomic_load(&pool->ticket);
    while ((int64_t)(uint32_t)ticket < atomic_load(&pool->num_items)) {
        if (atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) {
            *item = (uint32_t)ticket;
            return true;
        }
    }
    return false;
}

static void run_items(struct pool *pool, int thread) {
    for (int64_t item; claim(pool, &item);) {
        /* A claimed item keeps its region open, so all three fields belong to it. */
        const int64_t num_items = atomic_load(&pool->num_items);
        pool->task(pool->context, item, thread);
        if (atomic_fetch_add(&pool->num_done, 1) + 1 == num_items &&
            atomic_load(&pool->caller_sleeping)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->region_finished);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

static bool has_work(struct pool *pool) {
    return (int64_t)(uint32_t)atomic_load(&pool->ticket) < atomic_load(&pool->num_items);
}

static void wait_for_work(struct pool *pool) {
    for (int i = 0; i < SPIN_ITERATIONS; i++) {
        if (has_work(pool) || atomic_load(&pool->closing)) return;
        relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->num_sleeping, 1);
    while (!has_work(pool) && !atomic_load(&pool->closing))
        pthread_cond_wait(&pool->work_arrived, &pool->lock);
    atomic_fetch_sub(&pool->num_sleeping, 1);
    pthread_mutex_unlock(&pool->lock);
}

static void *helper_main(void *argument) {
    const struct helper *helper = argument;
    while (!atomic_load(&helper->pool->closing)) {
        run_items(helper->pool, helper->index);
        wait_for_work(helper->pool);
    }
    return NULL;
}

static void wait_until_finished(struct pool *pool, int64_t num_items) {
    for (int i = 0; i < SPIN_ITERATIONS; i++) {
        if (atomic_load(&pool->num_done) == num_items) return;
        relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_sleeping, true);
    while (atomic_load(&pool->num_done) < num_items)
        pthread_cond_wait(&pool->region_finished, &pool->lock);
    atomic_store(&pool->caller_sleeping, false);
    pthread_mutex_unlock(&pool->lock);
}

static void open_region(struct pool *pool, int64_t num_items, pool_task task,
                        const void *context) {
    pool->task = task;
    pool->context = context;
    atomic_store(&pool->num_done, 0);
    /* Items appear only with the new ticket: until then the old one reads as exhausted. */
    const uint64_t region = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, region << 32 | UINT32_MAX);
    atomic_store(&pool->num_items, num_items);
    atomic_store(&pool->ticket, region << 32);
    if (atomic_load(&pool->num_sleeping) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work_arrived);
        pthread_mutex_unlock(&pool->lock);
    }
}

void pool_run(struct pool *pool, int64_t num_items, pool_task task, const void *context) {
    pthread_mutex_lock(&pool->region_lock);
    if (pool->num_threads == 1 || num_items == 1) {
        for (int64_t item = 0; item < num_items; item++) task(context, item, 0);
    } else if (num_items > 1) {
        open_region(pool, num_items, task, context);
        run_items(pool, 0);
        wait_until_finished(pool, num_items);
    }
    pthread_mutex_unlock(&pool->region_lock);
}

struct pool *pool_create(int num_threads) {
    const size_t bytes = sizeof(struct pool) + (size_t)num_threads * sizeof(struct helper);
    const size_t scratch_bytes = (size_t)num_threads * POOL_SCRATCH_BYTES;
    struct pool *pool = aligned_alloc(CACHE_LINE_BYTES, (bytes + 63) / 64 * 64);
    char *scratch = aligned_alloc(CACHE_LINE_BYTES, scratch_bytes);
    if (pool == NULL || scratch == NULL) {
        free(pool);
        free(scratch);
        return NULL;
    }
    *pool = (struct pool){.num_threads = 1, .scratch = scratch};
    pthread_mutex_init(&pool->lock, NULL);
    pthread_mutex_init(&pool->region_lock, NULL);
    pthread_cond_init(&pool->work_arrived, NULL);
    pthread_cond_init(&pool->region_finished, NULL);
    for (int i = 1; i < num_threads; i++) {
        struct helper *helper = &pool->helpers[i];
        *helper = (struct helper){.pool = pool, .index = i};
        if (pthread_create(&helper->thread, NULL, helper_main, helper) != 0) {
            pool_destroy(pool);
            return NULL;
        }
        pool->num_threads = i + 1;
    }
    return pool;
}

void pool_destroy(struct pool *pool) {
    atomic_store(&pool->closing, true);
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->work_arrived);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->helpers[i].thread, NULL);
    pthread_cond_destroy(&pool->region_finished);
    pthread_cond_destroy(&pool->work_arrived);
    pthread_mutex_destroy(&pool->region_lock);
    pthread_mutex_destroy(&pool->lock);
    free(pool->scratch);
    free(pool);
}

int pool_num_threads(const struct pool *pool) { return pool->num_threads; }

void *pool_scratch(struct pool *pool, int thread) {
    return pool->scratch + (size_t)thread * POOL_SCRATCH_BYTES;
}
