/* Runs object code of dure's as a process of its own, on memory that a file describes: the form of
 * the file is that of dure.runtime.standalone.  Arguments: the file, the file for the results, how
 * often the step runs, and by how many workers, one after another. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void dure_step(void *context, int64_t worker, int64_t workers, void *pool);
__attribute__((weak)) void dure_load(void *context, int64_t worker, int64_t workers, void *pool);

/* What meets other workers has none here: a step runs with one, and several run a kernel in turn. */
void dure_barrier(void *pool, int64_t worker, int64_t workers) {
    (void)pool, (void)worker, (void)workers;
    abort();
}

struct block {
    uint64_t bytes, given, kept;
    char *memory;
};

static void fail(const char *what) {
    perror(what);
    exit(2);
}

static uint64_t number(FILE *file) {
    uint64_t value;
    if (fread(&value, sizeof value, 1, file) != 1) fail("the memory's file is cut off");
    return value;
}

static struct block *memory_of(FILE *file, uint64_t count) {
    struct block *blocks = calloc(count, sizeof *blocks);
    for (uint64_t i = 0; i < count; i++) {
        struct block *one = &blocks[i];
        one->bytes = number(file), one->given = number(file), one->kept = number(file);
        uint64_t whole = (one->bytes + 255) / 128 * 128; /* a vector may reach past the end */
        one->memory = aligned_alloc(128, whole);
        if (one->memory == NULL) fail("no memory");
        for (uint64_t at = 0; at < whole; at++) one->memory[at] = 0;
    }
    return blocks;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    FILE *file = fopen(argv[1], "rb");
    if (file == NULL) fail(argv[1]);
    uint64_t count = number(file), pointers = number(file);
    struct block *blocks = memory_of(file, count);
    uint64_t(*places)[4] = calloc(pointers + 1, sizeof *places);
    for (uint64_t i = 0; i < 4 * pointers; i++) places[i / 4][i % 4] = number(file);
    for (uint64_t i = 0; i < count; i++)
        if (fread(blocks[i].memory, 1, blocks[i].given, file) != blocks[i].given)
            fail("the memory's file is cut off");
    for (uint64_t i = 0; i < pointers; i++) {
        uint64_t *place = places[i];
        ((char **)blocks[place[0]].memory)[place[1]] = blocks[place[2]].memory + place[3];
    }
    if (dure_load) dure_load(blocks[1].memory, 0, 1, NULL);
    int64_t turns = atoll(argv[3]), workers = atoll(argv[4]);
    for (int64_t turn = 0; turn < turns; turn++)
        for (int64_t worker = 0; worker < workers; worker++)
            dure_step(blocks[0].memory, worker, workers, NULL);
    FILE *results = fopen(argv[2], "wb");
    if (results == NULL) fail(argv[2]);
    for (uint64_t i = 0; i < count; i++)
        if (blocks[i].kept && fwrite(blocks[i].memory, 1, blocks[i].bytes, results) != blocks[i].bytes)
            fail(argv[2]);
    return fclose(results) ? 2 : 0;
}
