"""The script that `sandbox.run` starts: it restricts its process, then runs the program given on stdin.

It imports only the standard library. The docstring of sandbox.py lists the restrictions.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import types

MEMORY = 512 * 2**20  # bytes of address space
FILE_SIZE = 8 * 2**20  # bytes per file
OPEN_FILES = 32
PROCESSES = 256  # threads that may be started in addition to those of the machine
# Number of access rights that Landlock knows, by version. Version 2 (Linux 5.19) added moves between folders,
# which version 1 (5.13) refuses. Version 3 (6.2) added truncation, which restrict_system_calls limits for all
# versions.
LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15}

# Constants of linux/landlock.h, prctl.h, seccomp.h and filter.h, which are the same on every machine.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 5, 1 << 8, 1 << 14
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVS, FILTER_MODE = 1, 22, 38, 2
LOAD, EQUAL, GREATER, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EACCES, ENOTTY, ENOSYS = 13, 25, 38
CLONE_THREAD, F_SETLKW, F_DUPFD_CLOEXEC = 0x10000, 7, 1030

# The system calls that a program may make, by machine: they read and write what Landlock lets it open, and
# handle its own memory, threads, signal handlers and clocks. Other calls fail, such as those for processes,
# sockets, signals to anyone, owners, modes and times of files, links, folders, limits, mounts, namespaces and
# tracing. `restrict_system_calls` also allows some calls listed beside "allowed", depending on arguments.
MACHINES = {
    "x86_64": {
        "audit": 0xC000003E, "clone": 56, "fcntl": 72, "ioctl": 16, "capset": 126, "open": 2, "openat": 257,
        "allowed": {
            "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
            "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
            "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
            "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33,
            "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "fsync": 74, "fdatasync": 75,
            "ftruncate": 77, "getcwd": 79, "chdir": 80, "rename": 82, "unlink": 87, "readlink": 89,
            "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104,
            "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201,
            "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
            "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
            "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267, "faccessat": 269,
            "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "pipe2": 293,
            "renameat2": 316, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
            "close_range": 436, "faccessat2": 439,
        },
    },
    "aarch64": {
        "audit": 0xC00000B7, "clone": 220, "fcntl": 25, "ioctl": 29, "capset": 91, "openat": 56,
        "allowed": {
            "getcwd": 17, "dup": 23, "dup3": 24, "unlinkat": 35, "renameat": 38, "ftruncate": 46,
            "faccessat": 48, "chdir": 49, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62,
            "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68,
            "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82,
            "fdatasync": 83, "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99,
            "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
            "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132,
            "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160,
            "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174,
            "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214,
            "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "renameat2": 276,
            "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "close_range": 436,
            "faccessat2": 439,
        },
    },
}  # fmt: skip


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def missing() -> list[str]:
    """Return the names of the kernel features that the sandbox needs and this machine lacks."""
    libc, lacks = _libc(), []
    if libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1) < 1:  # asks for Landlock's version
        lacks.append("Landlock (Linux 5.13 or newer, enabled)")
    # Given a filter at address 0, prctl fails with EFAULT if the kernel has filters, else with EINVAL.
    no_filters = libc.prctl(SET_SECCOMP, FILTER_MODE, None, 0, 0) == -1 and ctypes.get_errno() != 14  # EFAULT
    if no_filters or platform.machine() not in MACHINES:
        lacks.append(f"seccomp filters (on {' or '.join(MACHINES)})")
    return lacks


def _call(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _machine_threads() -> int:
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 10_000


def limit(cpu_seconds: int):
    for what, bound in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, _machine_threads() + PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        over = 1 if what == resource.RLIMIT_CPU else 0  # SIGXCPU, which names the reason, precedes SIGKILL
        resource.setrlimit(what, (bound, bound + over if hard == resource.RLIM_INFINITY else bound))


def restrict_files(folder: str, newest_landlock: int):
    """Let this process read only `folder`, Python's files and libraries, and write only in `folder`."""
    libc = _libc()
    version = min(newest_landlock, _call(libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)))
    # Each of these rights is refused unless granted below. Version 6 also refuses TCP, and abstract sockets
    # and signals that reach processes outside.
    handled = (1 << LANDLOCK_RIGHTS[min(version, 3)]) - 1
    ruleset = struct.pack("QQQ", handled, 3, 3)[: 24 if version >= 6 else 8]
    rules = _call(libc.syscall(CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0))
    read, write = READ_FILE | READ_DIR, WRITE_FILE | TRUNCATE
    libraries = {f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"}
    granted = {path: read for path in {*sys.path, *libraries} if os.path.isdir(path)}
    granted |= {"/etc/ld.so.cache": READ_FILE, "/dev/urandom": READ_FILE, "/dev/null": READ_FILE | write}
    granted[folder] = read | write | MAKE_REG | REMOVE_FILE
    for path, rights in granted.items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call(libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights & handled, fd), 0))
            os.close(fd)
    _call(libc.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)


def restrict_system_calls():
    """Let this process make only the system calls listed in MACHINES, and start threads but no processes."""
    machine = MACHINES[platform.machine()]

    def argument(n: int) -> int:  # offset of the lower 32 bits of argument n, on a little-endian machine
        return 16 + 8 * n

    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine["audit"]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for number in machine["allowed"].values():
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    # Before version 3, Landlock lets a program truncate files that it may only read.
    for name, flags in (("open", 1), ("openat", 2)):
        if name in machine:
            program += [
                (EQUAL, 0, 8, machine[name]), (LOAD, 0, 0, argument(flags)),
                (ANY_BIT, 1, 0, os.O_TRUNC), (RETURN, 0, 0, ALLOW),
                (AND, 0, 0, os.O_ACCMODE),
                (EQUAL, 1, 0, os.O_WRONLY), (EQUAL, 0, 1, os.O_RDWR), (RETURN, 0, 0, ALLOW),
                (RETURN, 0, 0, ERRNO | EACCES),
            ]  # fmt: skip
    program += [
        (EQUAL, 0, 1, machine["ioctl"]), (RETURN, 0, 0, ERRNO | ENOTTY),  # so that isatty() is False
        (EQUAL, 0, 4, machine["clone"]),
        (LOAD, 0, 0, argument(0)), (ANY_BIT, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | ENOSYS),
        (EQUAL, 0, 4, machine["fcntl"]),  # without F_SETOWN and F_SETSIG, which let the kernel signal others
        (LOAD, 0, 0, argument(1)),
        (EQUAL, 1, 0, F_DUPFD_CLOEXEC), (GREATER, 1, 0, F_SETLKW), (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | ENOSYS),  # libraries take this for an older kernel, and fall back
    ]  # fmt: skip
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _call(_libc().prctl(SET_SECCOMP, FILTER_MODE, filters, 0, 0))


def restrict_process(folder: str, cpu_seconds: int, newest_landlock: int):
    libc = _libc()
    _call(libc.prctl(SET_PDEATHSIG, 9, 0, 0, 0))
    _call(libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    limit(cpu_seconds)
    restrict_files(folder, newest_landlock)
    if os.geteuid() == 0:  # drop root's capabilities
        header, none = struct.pack("II", 0x20080522, 0), bytes(24)
        _call(libc.syscall(MACHINES[platform.machine()]["capset"], header, none))
    restrict_system_calls()


def main():
    with open(0, "rb", closefd=False) as stdin:  # read to its end, so that it is empty for the program
        nonce, _, program = stdin.read().partition(b"\n")
    answer = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(silence, fd)
    try:
        restrict_process(os.getcwd(), *map(int, sys.argv[1:]))
    except Exception as problem:
        os.write(answer, f"{type(problem).__name__}: {problem}".encode())
        return
    os.write(answer, b"+")
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException as problem:  # SystemExit too: a program that exits early has not run its test
        reason = filter(None, (type(problem).__name__, str(problem)))
        nonce = ": ".join(reason)[:200].encode(errors="replace")
    os.write(answer, nonce)
    os._exit(0)  # without waiting for its threads or running its exit handlers


if __name__ == "__main__":
    main()
