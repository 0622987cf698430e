/*
 * Makes one call of a process to the file system fail, below one directory, so that a test can see what the store makes
 * of it. Loaded with LD_PRELOAD; ../faults.rs chooses the call.
 *
 *   INJECTOR_ROOT    only files below this directory (canonical path) count
 *   INJECTOR_FAULT   "CALL FILE N ERRNO STICKY": the N-th CALL (from 0) on a FILE fails with ERRNO; STICKY 1 = and all later ones
 *   INJECTOR_COUNTS  where to write "CALL FILE COUNT" lines when the process exits
 *
 * CALL is open, read, write, sync, range, truncate, allocate, punch, rename, unlink or mkdir; FILE the kind of file: its
 * name without digits after a dot (warm.0 and warm.1 are "warm", snap.* is "snap"), "dir" for a directory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))

enum { KINDS = 256, NAME = 32 };
static struct { char call[NAME], file[NAME]; long count; } kinds[KINDS];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static const char *root, *counts;
static size_t root_len;
static char bad_call[NAME], bad_file[NAME];
static long bad_n = -1;
static int bad_errno, sticky;

static void *real(const char *name) {
    void *p = dlsym(RTLD_NEXT, name);
    if (!p) _exit(97);
    return p;
}

static void start(void) {
    const char *fault = getenv("INJECTOR_FAULT");
    root = getenv("INJECTOR_ROOT");
    counts = getenv("INJECTOR_COUNTS");
    if (!root) return;
    root_len = strlen(root);
    if (fault && sscanf(fault, "%31s %31s %ld %d %d", bad_call, bad_file, &bad_n, &bad_errno, &sticky) != 5) _exit(98);
}

__attribute__((destructor)) static void report(void) {
    if (!root || !counts) return;
    FILE *out = fopen(counts, "we");
    if (!out) _exit(99);
    for (int i = 0; i < used; i++) fprintf(out, "%s %s %ld\n", kinds[i].call, kinds[i].file, kinds[i].count);
    fclose(out);
}

static int below_root(const char *path) {
    return strncmp(path, root, root_len) == 0 && path[root_len] == '/';
}

static void kind_of(const char *path, int is_dir, char out[NAME]) {
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    if (strncmp(name, "snap.", 5) == 0) name = "snap";
    snprintf(out, NAME, "%.31s", is_dir ? "dir" : name);
    char *dot = strrchr(out, '.');
    if (dot && dot[1] >= '0' && dot[1] <= '9') *dot = 0;
}

/* Counts the call; 1 = it is to fail, errno is set. */
static int fails(const char *call, const char *path, int is_dir) {
    char file[NAME];
    kind_of(path, is_dir, file);
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < used && (strcmp(kinds[i].call, call) || strcmp(kinds[i].file, file))) i++;
    if (i == used) {
        if (used == KINDS) _exit(96);
        used++;
        snprintf(kinds[i].call, NAME, "%s", call);
        snprintf(kinds[i].file, NAME, "%s", file);
    }
    long n = kinds[i].count++;
    pthread_mutex_unlock(&lock);
    if (bad_n < 0 || strcmp(call, bad_call) || strcmp(file, bad_file)) return 0;
    if (n != bad_n && !(sticky && n > bad_n)) return 0;
    errno = bad_errno;
    return 1;
}

static int fails_fd(const char *call, int fd) {
    pthread_once(&once, start);
    if (!root) return 0;
    char link[64], path[PATH_MAX];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (n <= 0) return 0;
    path[n] = 0;
    if (!below_root(path)) return 0;
    struct stat st;
    int is_dir = fstat(fd, &st) == 0 && S_ISDIR(st.st_mode);
    errno = saved;
    return fails(call, path, is_dir);
}

/* The store uses absolute paths; removing a tree uses names in an open directory. */
static int fails_at(const char *call, int dir, const char *name) {
    pthread_once(&once, start);
    if (!root) return 0;
    char link[64], path[PATH_MAX], whole[2 * PATH_MAX];
    if (name[0] == '/') {
        return below_root(name) ? fails(call, name, 0) : 0;
    }
    if (dir == AT_FDCWD) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    snprintf(whole, sizeof whole, "%s/%s", path, name);
    return below_root(whole) ? fails(call, whole, 0) : 0;
}

#define OPENED(dir, path)                                                                                            \
    va_list ap;                                                                                                      \
    va_start(ap, flags);                                                                                             \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(ap, mode_t) : 0;                                          \
    va_end(ap);                                                                                                      \
    if (!(flags & O_DIRECTORY) && fails_at("open", dir, path)) return -1;
int open(const char *path, int flags, ...) { OPENED(AT_FDCWD, path) return REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { OPENED(AT_FDCWD, path) return REAL(open64)(path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { OPENED(dir, path) return REAL(openat)(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { OPENED(dir, path) return REAL(openat64)(dir, path, flags, mode); }

#define FD(type, name, call, parameters, arguments)                                                                  \
    type name parameters { return fails_fd(call, fd) ? -1 : REAL(name) arguments; }
FD(ssize_t, read, "read", (int fd, void *to, size_t n), (fd, to, n))
FD(ssize_t, pread, "read", (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
FD(ssize_t, pread64, "read", (int fd, void *to, size_t n, off64_t at), (fd, to, n, at))
FD(ssize_t, preadv2, "read", (int fd, const struct iovec *to, int n, off_t at, int flags), (fd, to, n, at, flags))
FD(ssize_t, preadv64v2, "read", (int fd, const struct iovec *to, int n, off64_t at, int flags), (fd, to, n, at, flags))
FD(ssize_t, write, "write", (int fd, const void *from, size_t n), (fd, from, n))
FD(ssize_t, writev, "write", (int fd, const struct iovec *from, int n), (fd, from, n))
FD(ssize_t, pwrite, "write", (int fd, const void *from, size_t n, off_t at), (fd, from, n, at))
FD(ssize_t, pwrite64, "write", (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at))
FD(ssize_t, pwritev2, "write", (int fd, const struct iovec *from, int n, off_t at, int flags), (fd, from, n, at, flags))
FD(ssize_t, pwritev64v2, "write", (int fd, const struct iovec *from, int n, off64_t at, int flags), (fd, from, n, at, flags))
FD(int, fsync, "sync", (int fd), (fd))
FD(int, fdatasync, "sync", (int fd), (fd))
FD(int, sync_file_range, "range", (int fd, off64_t at, off64_t n, unsigned flags), (fd, at, n, flags))
FD(int, ftruncate, "truncate", (int fd, off_t n), (fd, n))
FD(int, ftruncate64, "truncate", (int fd, off64_t n), (fd, n))

#define HOLE(mode) ((mode) & FALLOC_FL_PUNCH_HOLE ? "punch" : "allocate")
int fallocate(int fd, int mode, off_t at, off_t n) {
    return fails_fd(HOLE(mode), fd) ? -1 : REAL(fallocate)(fd, mode, at, n);
}
int fallocate64(int fd, int mode, off64_t at, off64_t n) {
    return fails_fd(HOLE(mode), fd) ? -1 : REAL(fallocate64)(fd, mode, at, n);
}
int rename(const char *from, const char *to) {
    return fails_at("rename", AT_FDCWD, from) ? -1 : REAL(rename)(from, to);
}
int renameat2(int fd, const char *from, int gd, const char *to, unsigned flags) {
    return fails_at("rename", fd, from) ? -1 : REAL(renameat2)(fd, from, gd, to, flags);
}
int unlink(const char *path) { return fails_at("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) {
    return fails_at("unlink", dir, path) ? -1 : REAL(unlinkat)(dir, path, flags);
}
int mkdir(const char *path, mode_t mode) { return fails_at("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
