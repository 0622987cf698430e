/*
 * Records what a process asks of the file system below one directory, so that a test can work out what a power cut
 * would have left. Loaded with LD_PRELOAD; see ../common/replay.rs for the reader of the log.
 *
 *   RECORDER_ROOT             only files below this directory (canonical path) are recorded
 *   RECORDER_LOG              where the log goes (outside of the root)
 *   RECORDER_SKIP_FDATASYNC   path suffix: fdatasync of such files does nothing and is not recorded (the control:
 *                             the test must see the loss that a forgotten fdatasync causes)
 *
 * Changes are made and logged under one lock, so the log has their true order. A sync is logged when it begins and
 * when it has ended, without the lock: it promises only what was logged before its begin. sync_file_range is logged
 * as what it is: no promise at all. Ways to change a file that this shim does not follow (shared mappings,
 * copy_file_range, O_SYNC ...) are logged as UNSUPPORTED, and the reader refuses such a log.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum op {
    OP_OPEN = 1,      /* fd, a = flags, text = path */
    OP_CLOSE,         /* fd */
    OP_WRITE,         /* fd, a = offset, b = 1 when made durable by RWF_DSYNC, text = data */
    OP_TRUNCATE,      /* fd, a = length */
    OP_SYNC_BEGIN,    /* fd, a = token */
    OP_SYNC_END,      /* fd, a = token, b = 1 when it succeeded */
    OP_PUNCH,         /* fd, a = offset, b = length */
    OP_ALLOCATE,      /* fd, a = new minimal length of the file */
    OP_RENAME,        /* a = flags, text = from NUL to */
    OP_UNLINK,        /* text = path */
    OP_MKDIR,         /* text = path */
    OP_RMDIR,         /* text = path */
    OP_DUP,           /* fd, a = new fd */
    OP_FILE_RANGE,    /* fd: sync_file_range */
    OP_UNSUPPORTED,   /* fd, text = what */
};

struct head {
    uint32_t op;
    int32_t fd;
    uint64_t a;
    uint64_t b;
    uint64_t len;
};

#define MAX_FD 4096
static char *tracked[MAX_FD]; /* path of each recorded descriptor, else NULL */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int log_fd = -1;
static const char *root, *skip;
static size_t root_len;
static uint64_t next_token = 1;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *p = dlsym(RTLD_NEXT, name);
    if (!p) {
        static const char text[] = "recorder: a libc function is missing\n";
        syscall(SYS_write, 2, text, sizeof text - 1);
        _exit(97);
    }
    return p;
}

static void start(void) {
    const char *path = getenv("RECORDER_LOG");
    root = getenv("RECORDER_ROOT");
    skip = getenv("RECORDER_SKIP_FDATASYNC");
    if (!path || !root) return;
    root_len = strlen(root);
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_fd < 0) _exit(98);
}

static int recording(void) {
    pthread_once(&once, start);
    return log_fd >= 0;
}

static void log_write(struct iovec *iov, int count) {
    /* A record cut short would make the reader refuse the log: better no process than a wrong log. */
    while (count > 0) {
        ssize_t n = syscall(SYS_writev, log_fd, iov, count);
        if (n < 0) {
            if (errno == EINTR) continue;
            _exit(99);
        }
        while (count > 0 && (size_t)n >= iov->iov_len) {
            n -= (ssize_t)iov->iov_len;
            iov++, count--;
        }
        if (count > 0) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
}

static void record(enum op op, int fd, uint64_t a, uint64_t b, const void *text, size_t len) {
    int saved = errno;
    struct head head = {op, fd, a, b, len};
    struct iovec iov[2] = {{&head, sizeof head}, {(void *)text, len}};
    log_write(iov, len ? 2 : 1);
    errno = saved;
}

/* Records a gathered write of which the kernel took `n` bytes. */
static void record_iov(int fd, uint64_t offset, int durable, const struct iovec *from, int count, size_t n) {
    int saved = errno;
    struct iovec iov[IOV_MAX < 1025 ? IOV_MAX : 1025];
    struct head head = {OP_WRITE, fd, offset, (uint64_t)durable, n};
    int used = 1;
    iov[0] = (struct iovec){&head, sizeof head};
    for (int i = 0; i < count && n > 0 && used < (int)(sizeof iov / sizeof iov[0]); i++) {
        size_t part = from[i].iov_len < n ? from[i].iov_len : n;
        if (!part) continue;
        iov[used++] = (struct iovec){from[i].iov_base, part};
        n -= part;
    }
    if (n > 0) _exit(99);
    log_write(iov, used);
    errno = saved;
}

static int is_tracked(int fd) { return recording() && fd >= 0 && fd < MAX_FD && tracked[fd] != NULL; }

static int below_root(const char *path) {
    return strncmp(path, root, root_len) == 0 && (path[root_len] == '/' || path[root_len] == 0);
}

/* Absolute path of `path` seen from `dirfd`. The parent is resolved, the last part is taken as it is. */
static int absolute(int dirfd, const char *path, char out[PATH_MAX]) {
    char joined[PATH_MAX];
    if (path[0] == '/') {
        if (snprintf(joined, sizeof joined, "%s", path) >= PATH_MAX) return 0;
    } else if (dirfd == AT_FDCWD) {
        if (!getcwd(out, PATH_MAX) || snprintf(joined, sizeof joined, "%s/%s", out, path) >= PATH_MAX) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
        ssize_t n = readlink(link, out, PATH_MAX - 1);
        if (n <= 0) return 0;
        out[n] = 0;
        if (snprintf(joined, sizeof joined, "%s/%s", out, path) >= PATH_MAX) return 0;
    }
    size_t n = strlen(joined);
    while (n > 1 && joined[n - 1] == '/') joined[--n] = 0;
    char *slash = strrchr(joined, '/');
    if (!slash) return 0;
    *slash = 0;
    char parent[PATH_MAX];
    if (!realpath(slash == joined ? "/" : joined, parent)) return 0;
    return snprintf(out, PATH_MAX, "%s/%s", parent, slash + 1) < PATH_MAX;
}

/* ---- open and close ------------------------------------------------------------------------------------------- */

static int opened(int fd, int flags) {
    if (fd < 0) return fd;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int saved = errno;
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (n <= 0) return fd;
    path[n] = 0;
    if (!below_root(path)) return fd;
    if (fd >= MAX_FD) _exit(96);
    free(tracked[fd]);
    tracked[fd] = strdup(path);
    record(OP_OPEN, fd, (uint64_t)(unsigned)flags, 0, path, strlen(path));
    if (flags & (O_SYNC | O_DSYNC | O_DIRECT)) record(OP_UNSUPPORTED, fd, 0, 0, "O_SYNC/O_DIRECT", 15);
    return fd;
}

static mode_t mode_of(int flags, va_list ap) {
    return (flags & (O_CREAT | O_TMPFILE)) ? va_arg(ap, mode_t) : 0;
}

#define OPEN(name)                                                                                                   \
    int name(const char *path, int flags, ...) {                                                                     \
        va_list ap;                                                                                                  \
        va_start(ap, flags);                                                                                         \
        mode_t mode = mode_of(flags, ap);                                                                            \
        va_end(ap);                                                                                                  \
        if (!recording()) return REAL(name)(path, flags, mode);                                                      \
        pthread_mutex_lock(&lock);                                                                                   \
        int fd = opened(REAL(name)(path, flags, mode), flags);                                                       \
        pthread_mutex_unlock(&lock);                                                                                 \
        return fd;                                                                                                   \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                 \
    int name(int dir, const char *path, int flags, ...) {                                                            \
        va_list ap;                                                                                                  \
        va_start(ap, flags);                                                                                         \
        mode_t mode = mode_of(flags, ap);                                                                            \
        va_end(ap);                                                                                                  \
        if (!recording()) return REAL(name)(dir, path, flags, mode);                                                 \
        pthread_mutex_lock(&lock);                                                                                   \
        int fd = opened(REAL(name)(dir, path, flags, mode), flags);                                                  \
        pthread_mutex_unlock(&lock);                                                                                 \
        return fd;                                                                                                   \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    if (!is_tracked(fd)) return REAL(close)(fd);
    pthread_mutex_lock(&lock);
    if (tracked[fd]) {
        record(OP_CLOSE, fd, 0, 0, NULL, 0);
        free(tracked[fd]);
        tracked[fd] = NULL;
    }
    int r = REAL(close)(fd);
    pthread_mutex_unlock(&lock);
    return r;
}

static void duplicated(int fd, int copy) {
    if (copy < 0 || copy >= MAX_FD || !tracked[fd]) return;
    free(tracked[copy]);
    tracked[copy] = strdup(tracked[fd]);
    record(OP_DUP, fd, (uint64_t)copy, 0, NULL, 0);
}

#define FCNTL(name)                                                                                                  \
    int name(int fd, int cmd, ...) {                                                                                 \
        va_list ap;                                                                                                  \
        va_start(ap, cmd);                                                                                           \
        void *arg = va_arg(ap, void *);                                                                              \
        va_end(ap);                                                                                                  \
        if ((cmd != F_DUPFD && cmd != F_DUPFD_CLOEXEC) || !is_tracked(fd)) return REAL(name)(fd, cmd, arg);          \
        pthread_mutex_lock(&lock);                                                                                   \
        int r = REAL(name)(fd, cmd, arg);                                                                            \
        duplicated(fd, r);                                                                                           \
        pthread_mutex_unlock(&lock);                                                                                 \
        return r;                                                                                                    \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

/* ---- data ------------------------------------------------------------------------------------------------------ */

ssize_t write(int fd, const void *data, size_t n) {
    if (!is_tracked(fd)) return REAL(write)(fd, data, n);
    pthread_mutex_lock(&lock);
    ssize_t r = REAL(write)(fd, data, n);
    if (r > 0) record(OP_WRITE, fd, (uint64_t)(lseek(fd, 0, SEEK_CUR) - r), 0, data, (size_t)r);
    pthread_mutex_unlock(&lock);
    return r;
}

ssize_t writev(int fd, const struct iovec *iov, int count) {
    if (!is_tracked(fd)) return REAL(writev)(fd, iov, count);
    pthread_mutex_lock(&lock);
    ssize_t r = REAL(writev)(fd, iov, count);
    if (r > 0) record_iov(fd, (uint64_t)(lseek(fd, 0, SEEK_CUR) - r), 0, iov, count, (size_t)r);
    pthread_mutex_unlock(&lock);
    return r;
}

#define PWRITE(name, type)                                                                                           \
    ssize_t name(int fd, const void *data, size_t n, type at) {                                                      \
        if (!is_tracked(fd)) return REAL(name)(fd, data, n, at);                                                     \
        pthread_mutex_lock(&lock);                                                                                   \
        ssize_t r = REAL(name)(fd, data, n, at);                                                                     \
        if (r > 0) record(OP_WRITE, fd, (uint64_t)at, 0, data, (size_t)r);                                           \
        pthread_mutex_unlock(&lock);                                                                                 \
        return r;                                                                                                    \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define PWRITEV(name, type)                                                                                          \
    ssize_t name(int fd, const struct iovec *iov, int count, type at) {                                              \
        if (!is_tracked(fd)) return REAL(name)(fd, iov, count, at);                                                  \
        pthread_mutex_lock(&lock);                                                                                   \
        ssize_t r = REAL(name)(fd, iov, count, at);                                                                  \
        if (r > 0) record_iov(fd, (uint64_t)at, 0, iov, count, (size_t)r);                                           \
        pthread_mutex_unlock(&lock);                                                                                 \
        return r;                                                                                                    \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)

#define PWRITEV2(name, type)                                                                                         \
    ssize_t name(int fd, const struct iovec *iov, int count, type at, int flags) {                                   \
        if (!is_tracked(fd)) return REAL(name)(fd, iov, count, at, flags);                                           \
        pthread_mutex_lock(&lock);                                                                                   \
        ssize_t r = REAL(name)(fd, iov, count, at, flags);                                                           \
        int durable = (flags & (RWF_DSYNC | RWF_SYNC)) != 0;                                                         \
        if (r > 0) record_iov(fd, (uint64_t)at, durable, iov, count, (size_t)r);                                     \
        pthread_mutex_unlock(&lock);                                                                                 \
        return r;                                                                                                    \
    }
PWRITEV2(pwritev2, off_t)
PWRITEV2(pwritev64v2, off64_t)

#define FTRUNCATE(name, type)                                                                                        \
    int name(int fd, type len) {                                                                                     \
        if (!is_tracked(fd)) return REAL(name)(fd, len);                                                             \
        pthread_mutex_lock(&lock);                                                                                   \
        int r = REAL(name)(fd, len);                                                                                 \
        if (r == 0) record(OP_TRUNCATE, fd, (uint64_t)len, 0, NULL, 0);                                              \
        pthread_mutex_unlock(&lock);                                                                                 \
        return r;                                                                                                    \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

static void allocated(int fd, int mode, uint64_t at, uint64_t len) {
    if (mode & FALLOC_FL_PUNCH_HOLE) {
        record(OP_PUNCH, fd, at, len, NULL, 0);
    } else if (mode == 0) {
        record(OP_ALLOCATE, fd, at + len, 0, NULL, 0);
    } else if (mode != FALLOC_FL_KEEP_SIZE) {
        record(OP_UNSUPPORTED, fd, 0, 0, "fallocate mode", 14);
    }
}

#define FALLOCATE(name, type)                                                                                        \
    int name(int fd, int mode, type at, type len) {                                                                  \
        if (!is_tracked(fd)) return REAL(name)(fd, mode, at, len);                                                   \
        pthread_mutex_lock(&lock);                                                                                   \
        int r = REAL(name)(fd, mode, at, len);                                                                       \
        if (r == 0) allocated(fd, mode, (uint64_t)at, (uint64_t)len);                                                \
        pthread_mutex_unlock(&lock);                                                                                 \
        return r;                                                                                                    \
    }
FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)

#define POSIX_FALLOCATE(name, type)                                                                                  \
    int name(int fd, type at, type len) {                                                                            \
        if (!is_tracked(fd)) return REAL(name)(fd, at, len);                                                         \
        pthread_mutex_lock(&lock);                                                                                   \
        int r = REAL(name)(fd, at, len);                                                                             \
        if (r == 0) allocated(fd, 0, (uint64_t)at, (uint64_t)len);                                                   \
        pthread_mutex_unlock(&lock);                                                                                 \
        return r;                                                                                                    \
    }
POSIX_FALLOCATE(posix_fallocate, off_t)
POSIX_FALLOCATE(posix_fallocate64, off64_t)

/* ---- syncs ------------------------------------------------------------------------------------------------------ */

static int synced(int fd, int (*call)(int)) {
    pthread_mutex_lock(&lock);
    uint64_t token = next_token++;
    record(OP_SYNC_BEGIN, fd, token, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    int r = call(fd);
    pthread_mutex_lock(&lock);
    record(OP_SYNC_END, fd, token, r == 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return r;
}

int fsync(int fd) {
    if (!is_tracked(fd)) return REAL(fsync)(fd);
    return synced(fd, REAL(fsync));
}

static int left_out(int fd) {
    if (!skip) return 0;
    size_t n = strlen(skip), m = strlen(tracked[fd]);
    return m >= n && strcmp(tracked[fd] + m - n, skip) == 0;
}

int fdatasync(int fd) {
    if (!is_tracked(fd)) return REAL(fdatasync)(fd);
    if (left_out(fd)) return 0;
    return synced(fd, REAL(fdatasync));
}

int sync_file_range(int fd, off64_t at, off64_t len, unsigned flags) {
    if (!is_tracked(fd)) return REAL(sync_file_range)(fd, at, len, flags);
    pthread_mutex_lock(&lock);
    record(OP_FILE_RANGE, fd, (uint64_t)at, (uint64_t)len, NULL, 0);
    pthread_mutex_unlock(&lock);
    return REAL(sync_file_range)(fd, at, len, flags);
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

static int renamed(int r, const char *a, const char *b, unsigned flags) {
    if (r == 0 && (below_root(a) || below_root(b))) {
        char text[2 * PATH_MAX];
        size_t n = strlen(a) + 1, m = strlen(b);
        memcpy(text, a, n);
        memcpy(text + n, b, m);
        record(OP_RENAME, -1, flags, 0, text, n + m);
    }
    return r;
}

int rename(const char *from, const char *to) {
    char a[PATH_MAX], b[PATH_MAX];
    if (!recording() || !absolute(AT_FDCWD, from, a) || !absolute(AT_FDCWD, to, b)) return REAL(rename)(from, to);
    pthread_mutex_lock(&lock);
    int r = renamed(REAL(rename)(from, to), a, b, 0);
    pthread_mutex_unlock(&lock);
    return r;
}

int renameat(int fd, const char *from, int gd, const char *to) {
    char a[PATH_MAX], b[PATH_MAX];
    if (!recording() || !absolute(fd, from, a) || !absolute(gd, to, b)) return REAL(renameat)(fd, from, gd, to);
    pthread_mutex_lock(&lock);
    int r = renamed(REAL(renameat)(fd, from, gd, to), a, b, 0);
    pthread_mutex_unlock(&lock);
    return r;
}

int renameat2(int fd, const char *from, int gd, const char *to, unsigned flags) {
    char a[PATH_MAX], b[PATH_MAX];
    if (!recording() || !absolute(fd, from, a) || !absolute(gd, to, b))
        return REAL(renameat2)(fd, from, gd, to, flags);
    pthread_mutex_lock(&lock);
    int r = renamed(REAL(renameat2)(fd, from, gd, to, flags), a, b, flags);
    /* 1: not over an existing one, 2: exchange. */
    if (r == 0 && (flags & ~3u) && below_root(a)) record(OP_UNSUPPORTED, -1, 0, 0, "renameat2 flags", 15);
    pthread_mutex_unlock(&lock);
    return r;
}

static int named(enum op op, int r, const char *path) {
    if (r == 0 && below_root(path)) record(op, -1, 0, 0, path, strlen(path));
    return r;
}

#define NAMED(op, dir, path, call)                                                                                   \
    char full[PATH_MAX];                                                                                             \
    if (!recording() || !absolute(dir, path, full)) return call;                                                     \
    pthread_mutex_lock(&lock);                                                                                       \
    int r = named(op, call, full);                                                                                   \
    pthread_mutex_unlock(&lock);                                                                                     \
    return r;

int unlink(const char *path) { NAMED(OP_UNLINK, AT_FDCWD, path, REAL(unlink)(path)) }
int rmdir(const char *path) { NAMED(OP_RMDIR, AT_FDCWD, path, REAL(rmdir)(path)) }
int mkdir(const char *path, mode_t mode) { NAMED(OP_MKDIR, AT_FDCWD, path, REAL(mkdir)(path, mode)) }
int mkdirat(int dir, const char *path, mode_t mode) { NAMED(OP_MKDIR, dir, path, REAL(mkdirat)(dir, path, mode)) }
int unlinkat(int dir, const char *path, int flags) {
    NAMED((flags & AT_REMOVEDIR) ? OP_RMDIR : OP_UNLINK, dir, path, REAL(unlinkat)(dir, path, flags))
}

static void unsupported(int fd, const char *what) {
    pthread_mutex_lock(&lock);
    record(OP_UNSUPPORTED, fd, 0, 0, what, strlen(what));
    pthread_mutex_unlock(&lock);
}

int link(const char *from, const char *to) {
    char full[PATH_MAX];
    if (recording() && absolute(AT_FDCWD, to, full) && below_root(full)) unsupported(-1, "link");
    return REAL(link)(from, to);
}

int symlink(const char *from, const char *to) {
    char full[PATH_MAX];
    if (recording() && absolute(AT_FDCWD, to, full) && below_root(full)) unsupported(-1, "symlink");
    return REAL(symlink)(from, to);
}

/* ---- what is not followed ---------------------------------------------------------------------------------------- */

#define MMAP(name, type)                                                                                             \
    void *name(void *at, size_t len, int prot, int flags, int fd, type offset) {                                     \
        if ((flags & MAP_SHARED) && (prot & PROT_WRITE) && is_tracked(fd)) unsupported(fd, "shared mapping");        \
        return REAL(name)(at, len, prot, flags, fd, offset);                                                         \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t n, unsigned flags) {
    if (is_tracked(out)) unsupported(out, "copy_file_range");
    return REAL(copy_file_range)(in, in_at, out, out_at, n, flags);
}
