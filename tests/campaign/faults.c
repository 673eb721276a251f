/* Makes the n-th call of the system that touches a folder fail, whoever makes it: the C library, or code that calls the
 * system itself, as Rust does.
 *
 * Loaded with LD_PRELOAD, it installs a filter that turns such calls into SIGSYS; the handler counts them, and makes them
 * itself from one address that the filter lets pass. x86-64 Linux.
 *
 *   FAULT_FOLDER  the folder: calls on its paths, on relative paths, and on files opened by them count
 *   FAULT_NUMBER  which call fails, from 1 on; 0 for none
 *   FAULT_ERROR   the errno, or -1 for half of a read or write
 *   FAULT_REPORT  a file that gets "number of calls, name of the failed one" when the process ends
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* One instruction that makes a call, at an address that the filter knows. */
__asm__(".text\n.globl fault_call\n.globl fault_return\nfault_call:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\nmov %r8, %r10\nmov %r9, %r8\n"
        "mov 8(%rsp), %r9\nsyscall\nfault_return:\nret\n");
long fault_call(long number, long a, long b, long c, long d, long e, long f);
extern char fault_return[];

static const struct { int number; const char *name; } CALLS[] = {
    {SYS_open, "open"},           {SYS_openat, "openat"},       {SYS_close, "close"},
    {SYS_read, "read"},           {SYS_pread64, "pread"},       {SYS_write, "write"},
    {SYS_pwrite64, "pwrite"},     {SYS_writev, "writev"},       {SYS_fsync, "fsync"},
    {SYS_fdatasync, "fdatasync"}, {SYS_ftruncate, "ftruncate"}, {SYS_fallocate, "fallocate"},
    {SYS_rename, "rename"},       {SYS_renameat, "renameat"},   {SYS_renameat2, "renameat2"},
    {SYS_link, "link"},           {SYS_linkat, "linkat"},       {SYS_mkdir, "mkdir"},
    {SYS_mkdirat, "mkdirat"},     {SYS_fchmod, "fchmod"},       {SYS_chmod, "chmod"},
    {SYS_fchmodat, "fchmodat"},   {SYS_lseek, "lseek"},         {SYS_getdents64, "getdents"},
    {SYS_copy_file_range, "copy_file_range"},
};
enum { COUNT = sizeof CALLS / sizeof *CALLS, FILES = 4096 };

static const char *folder;
static size_t folder_length;
static long number, fault;
static char report[4096];
static atomic_long seen;
static atomic_int failed = -1;
static atomic_char ours[FILES];

static int in_folder(const char *path) {
    return path[0] != '/' || strncmp(path, folder, folder_length) == 0 || strncmp(path, "/proc/self/fd/", 14) == 0;
}

/* Whether a call touches the folder. */
static int counts(long call, const long *a) {
    switch (call) {
    case SYS_open: case SYS_rename: case SYS_link: case SYS_mkdir: case SYS_chmod:
        return in_folder((const char *)a[0]);
    case SYS_openat: case SYS_renameat: case SYS_renameat2: case SYS_linkat: case SYS_mkdirat: case SYS_fchmodat:
        return in_folder((const char *)a[1]);
    default:
        return a[0] >= 0 && a[0] < FILES && ours[a[0]];
    }
}

static void on_call(int signal, siginfo_t *info, void *context) {
    (void)signal;
    int saved = errno;
    ucontext_t *u = context;
    greg_t *r = u->uc_mcontext.gregs;
    long call = info->si_syscall;
    long a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
    int counted = counts(call, a);
    if (counted && call != SYS_close) {
        long mine = atomic_fetch_add(&seen, 1) + 1;
        if (mine == number) {
            int cuttable = call == SYS_read || call == SYS_pread64 || call == SYS_write || call == SYS_pwrite64;
            if (fault > 0 || (cuttable && a[2] > 1)) {
                for (int i = 0; i < COUNT; i++)
                    if (CALLS[i].number == call) failed = i;
            }
            if (fault > 0) {
                r[REG_RAX] = -fault;
                errno = saved;
                return;
            }
            if (cuttable && a[2] > 1) a[2] /= 2;
        }
    }
    if (call == SYS_close && a[0] >= 0 && a[0] < FILES) ours[a[0]] = 0;
    long result = fault_call(call, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (counted && (call == SYS_open || call == SYS_openat) && result >= 0 && result < FILES) ours[result] = 1;
    r[REG_RAX] = result;
    errno = saved;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULT_REPORT");
    folder = getenv("FAULT_FOLDER");
    if (!folder || !path) return;
    folder_length = strlen(folder);
    number = atol(getenv("FAULT_NUMBER"));
    fault = atol(getenv("FAULT_ERROR"));
    snprintf(report, sizeof report, "%s", path);
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSYS, &action, NULL);
    unsigned long at = (unsigned long)fault_return;
    struct sock_filter filter[7 + COUNT + 2];
    int n = 0;
    /* Calls from our own instruction pass, and all that are not in the list. */
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer));
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)at, 0, 3);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4);
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(at >> 32), 0, 1);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < COUNT; i++)
        filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)CALLS[i].number, COUNT - i, 0);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) _exit(99);
}

__attribute__((destructor)) static void end(void) {
    if (!report[0]) return;
    char text[128];
    int length = snprintf(text, sizeof text, "%ld %s\n", (long)seen, failed < 0 ? "none" : CALLS[failed].name);
    long file = fault_call(SYS_open, (long)report, O_WRONLY | O_CREAT | O_TRUNC, 0644, 0, 0, 0);
    fault_call(SYS_write, file, (long)text, length, 0, 0, 0);
    fault_call(SYS_close, file, 0, 0, 0, 0, 0);
}
