/* The part of the CUDA 13 runtime that torch calls, with host memory as device memory.
 *
 * - Loaded in front of libcudart (LD_PRELOAD). What is not defined here goes to the real library, which has no driver
 *   and returns an error. So a function that is missing is loud.
 * - Streams are numbers: everything is done when it is asked for. Events hold the time of their record.
 * - No kernel runs. A launch is an error: the emulation computes every operation on the CPU instead.
 * - Fresh memory is all ones (NaN as a float), so that nothing relies on zeros.
 * - EMULATED_CUDA_DEVICES is the number of devices (1), EMULATED_CUDA_GIB the memory of each (80).
 *
 * Structs are declared here as the CUDA 13 headers have them, so that no headers are needed.
 */
#include <malloc.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DONE = 0, BAD_VALUE = 1, NO_MEMORY = 2, NO_KERNEL = 98, BAD_DEVICE = 101, BAD_HANDLE = 400, NOT_SUPPORTED = 801 };
enum { UNREGISTERED = 0, HOST = 1, DEVICE = 2 };
enum { VERSION = 13000, CAPABILITY = 9, MAX_DEVICES = 64 };

static int devices = 1;
static size_t device_bytes = (size_t)80 << 30;
static __thread int current_device = 0;
static __thread int last_error = DONE;

/* Not when the library is loaded: a forked process has an environment of its own. */
static void read_environment(void) {
    const char *count = getenv("EMULATED_CUDA_DEVICES"), *gib = getenv("EMULATED_CUDA_GIB");
    if (count) devices = atoi(count);
    if (devices > MAX_DEVICES) devices = MAX_DEVICES;
    if (gib) device_bytes = (size_t)atoi(gib) << 30;
}

static int fail(int error) { return last_error = error; }

/* Whoever wants to know is called when the host waits for the device. */

static void (*listener)(const char *);

void emulated_cuda_listen(void (*function)(const char *)) { listener = function; }

static int wait_for(const char *what) {
    if (listener) listener(what);
    return DONE;
}

/* Memory: every block is known, so that a pointer can be told from another. */

struct block {
    char *begin;
    size_t bytes;
    int kind, device;
    struct block *next;
};

static struct block *blocks;
static size_t used[MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int take(void **result, size_t bytes, int kind) {
    size_t whole = (bytes + 4095) / 4096 * 4096;
    struct block *block = malloc(sizeof *block);
    pthread_mutex_lock(&lock);
    int fits = kind == HOST || used[current_device] + whole <= device_bytes;
    char *begin = fits && block ? aligned_alloc(4096, whole ? whole : 4096) : NULL;
    if (begin) {
        *block = (struct block){begin, whole, kind, current_device, blocks};
        blocks = block;
        if (kind == DEVICE) used[current_device] += whole;
    }
    pthread_mutex_unlock(&lock);
    if (!begin) {
        free(block);
        return fail(NO_MEMORY);
    }
    if (kind == DEVICE) memset(begin, 0xff, whole);
    *result = begin;
    return DONE;
}

static int give_back(void *pointer, int kind) {
    if (!pointer) return DONE;
    pthread_mutex_lock(&lock);
    struct block **link = &blocks;
    while (*link && ((*link)->begin != pointer || (*link)->kind != kind)) link = &(*link)->next;
    struct block *found = *link;
    if (found) {
        *link = found->next;
        if (kind == DEVICE) used[found->device] -= found->bytes;
    }
    pthread_mutex_unlock(&lock);
    if (!found) return fail(BAD_VALUE);
    free(found->begin);
    free(found);
    return DONE;
}

int cudaMalloc(void **result, size_t bytes) { return take(result, bytes, DEVICE); }
int cudaFree(void *pointer) { return give_back(pointer, DEVICE); }
int cudaHostAlloc(void **result, size_t bytes, unsigned flags) { return take(result, bytes, HOST); }
int cudaFreeHost(void *pointer) { return give_back(pointer, HOST); }

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = device_bytes;
    *free_bytes = device_bytes - used[current_device];
    return DONE;
}

struct attributes {
    int kind, device;
    void *device_pointer, *host_pointer;
    long reserved[8];
};

int cudaPointerGetAttributes(struct attributes *result, const void *pointer) {
    *result = (struct attributes){.kind = UNREGISTERED, .device = -2};
    pthread_mutex_lock(&lock);
    for (struct block *block = blocks; block; block = block->next)
        if ((const char *)pointer >= block->begin && (const char *)pointer < block->begin + block->bytes) {
            void *same = (void *)pointer;
            *result = (struct attributes){block->kind, block->device, same, block->kind == HOST ? same : NULL};
        }
    pthread_mutex_unlock(&lock);
    return DONE;
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    memmove(to, from, bytes);
    return DONE;
}
int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, void *stream) {
    return cudaMemcpyAsync(to, from, bytes, 0, stream);
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    cudaMemcpyAsync(to, from, bytes, kind, NULL);
    return wait_for("copy");
}
int cudaMemset(void *to, int value, size_t bytes) {
    memset(to, value, bytes);
    return DONE;
}
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { return cudaMemset(to, value, bytes); }

/* Devices. */

struct properties {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t memory_bytes, shared_bytes_of_block;
    int registers_of_block, warp_size;
    size_t pitch;
    int threads_of_block, threads[3], grid[3];
    size_t constant_bytes;
    int major, minor;
    size_t texture_alignment, texture_pitch;
    int processors, integrated, maps_host_memory, textures[39];
    size_t surface_alignment;
    int concurrent_kernels, ecc, bus[3], tcc, copy_engines, unified, bus_bits;
    int l2_bytes, persisting_l2_bytes, threads_of_processor, priorities, l1[2];
    size_t shared_bytes_of_processor;
    int registers_of_processor, managed[9];
    size_t shared_bytes_optin;
    int others[82];
};

int cudaGetDeviceProperties(struct properties *result, int device) {
    if (device < 0 || device >= devices) return fail(BAD_DEVICE);
    memset(result, 0, sizeof *result);
    strcpy(result->name, "NVIDIA H100 80GB HBM3 (emulated)");
    result->uuid[0] = (char)(device + 1);
    result->memory_bytes = device_bytes;
    result->major = CAPABILITY;
    result->warp_size = 32;
    result->processors = 132;
    result->threads_of_block = 1024;
    result->threads_of_processor = 2048;
    result->shared_bytes_of_block = 48 << 10;
    result->shared_bytes_of_processor = 228 << 10;
    result->shared_bytes_optin = 227 << 10;
    result->registers_of_block = result->registers_of_processor = 65536;
    result->l2_bytes = 50 << 20;
    result->bus[0] = device + 1;
    result->unified = 1;
    return DONE;
}

int cudaGetDeviceCount(int *result) {
    read_environment();
    *result = devices;
    return DONE;
}
int cudaGetDevice(int *result) {
    *result = current_device;
    return DONE;
}
int cudaSetDevice(int device) {
    if (device < 0 || device >= devices) return fail(BAD_DEVICE);
    current_device = device;
    return DONE;
}
int cudaDeviceGetAttribute(int *result, int attribute, int device) {
    *result = 0;
    return DONE;
}
int cudaDeviceGetPCIBusId(char *result, int bytes, int device) {
    snprintf(result, bytes, "0000:%02x:00.0", device + 1);
    return DONE;
}
int cudaDeviceCanAccessPeer(int *result, int device, int peer) {
    *result = device != peer;
    return DONE;
}
int cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return DONE; }
int cudaDeviceSynchronize(void) { return wait_for("device synchronize"); }
int cudaDriverGetVersion(int *result) {
    *result = VERSION;
    return DONE;
}
int cudaRuntimeGetVersion(int *result) {
    *result = VERSION;
    return DONE;
}

/* Errors. */

int cudaGetLastError(void) {
    int error = last_error;
    last_error = DONE;
    return error;
}
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(int error) { return error == DONE ? "cudaSuccess" : "cudaErrorOfTheEmulation"; }
const char *cudaGetErrorString(int error) {
    switch (error) {
    case DONE: return "no error";
    case BAD_VALUE: return "invalid argument";
    case NO_MEMORY: return "out of memory";
    case NO_KERNEL: return "emulated CUDA runs no kernels: an operation has reached the device";
    case BAD_DEVICE: return "invalid device ordinal";
    case BAD_HANDLE: return "invalid resource handle";
    case NOT_SUPPORTED: return "operation not supported by emulated CUDA";
    default: return "error of emulated CUDA";
    }
}

/* Streams and events. */

struct event {
    double at;
    int recorded;
};

static int new_stream(void **result) {
    *result = malloc(8);
    return *result ? DONE : fail(NO_MEMORY);
}
int cudaStreamCreate(void **result) { return new_stream(result); }
int cudaStreamCreateWithFlags(void **result, unsigned flags) { return new_stream(result); }
int cudaStreamCreateWithPriority(void **result, unsigned flags, int priority) { return new_stream(result); }
int cudaStreamDestroy(void *stream) {
    free(stream);
    return DONE;
}
int cudaStreamQuery(void *stream) { return DONE; }
int cudaStreamSynchronize(void *stream) { return wait_for("stream synchronize"); }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return DONE; }
int cudaStreamGetPriority(void *stream, int *result) {
    *result = 0;
    return DONE;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return DONE;
}

int cudaEventCreateWithFlags(struct event **result, unsigned flags) {
    *result = calloc(1, sizeof **result);
    return *result ? DONE : fail(NO_MEMORY);
}
int cudaEventCreate(struct event **result) { return cudaEventCreateWithFlags(result, 0); }
int cudaEventDestroy(struct event *event) {
    free(event);
    return DONE;
}
int cudaEventRecord(struct event *event, void *stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->at = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
    event->recorded = 1;
    return DONE;
}
int cudaEventRecordWithFlags(struct event *event, void *stream, unsigned flags) { return cudaEventRecord(event, stream); }
int cudaEventQuery(struct event *event) { return DONE; }
int cudaEventSynchronize(struct event *event) { return wait_for("event synchronize"); }
int cudaEventElapsedTime(float *milliseconds, const struct event *from, const struct event *to) {
    if (!from->recorded || !to->recorded) return fail(BAD_HANDLE);
    *milliseconds = (float)(to->at - from->at);
    return DONE;
}

/* Graphs cannot be captured: callers take their way without one. */

int cudaStreamIsCapturing(void *stream, int *result) {
    *result = 0;
    return DONE;
}
int cudaStreamGetCaptureInfo(void *stream, int *result, ...) {
    *result = 0;
    return DONE;
}
int cudaThreadExchangeStreamCaptureMode(int *mode) { return DONE; }
int cudaStreamBeginCapture(void *stream, int mode) { return fail(NOT_SUPPORTED); }
int cudaStreamEndCapture(void *stream, void **graph) {
    *graph = NULL;
    return fail(NOT_SUPPORTED);
}

/* Kernels. */

static int refuse_launch(void) {
    fprintf(stderr, "emulated CUDA: a kernel was launched\n");
    return fail(NO_KERNEL);
}
int cudaLaunchKernel(const void *function, ...) { return refuse_launch(); }
int __cudaLaunchKernel(const void *kernel, ...) { return refuse_launch(); }
int __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)function;
    return DONE;
}
int cudaLaunchKernelExC(const void *config, const void *function, void **arguments) { return refuse_launch(); }
int cudaFuncSetAttribute(const void *function, int attribute, int value) { return DONE; }
