"""Programs that mean harm. They know `parent` (a process), `outside` (a folder), `port` and `name` (of open sockets).

ATTACKS come to their end only if they got what they were after; RUNAWAYS want to last or to fill something; LEAVERS
want to be done before their test is. "# not outside": not to be tried without a sandbox, or not sure to succeed there.
"""

SYSCALL = "libc = ctypes.CDLL(None, use_errno=True)\n"

ATTACKS = [
    # files: made, changed, deleted, moved, linked, read
    "open(f'{outside}/new', 'w').close()",
    "open(f'{outside}/kept', 'w').close()",
    "open(f'{outside}/kept', 'a').write('more')",
    "os.open(f'{outside}/kept', os.O_RDONLY | os.O_TRUNC)",
    "os.open(f'{outside}/kept', 3 | os.O_TRUNC)",
    "os.truncate(f'{outside}/kept', 0)",
    "os.remove(f'{outside}/kept')",
    "import shutil; shutil.rmtree(f'{outside}/inner')",
    "os.rename(f'{outside}/kept', f'{outside}/moved')",
    "os.rename(f'{outside}/kept', 'stolen')",
    "open('bait', 'w').close(); os.rename('bait', f'{outside}/kept')",
    "os.link(f'{outside}/kept', 'mine'); open('mine', 'w').close()",
    "open('bait', 'w').close(); os.link('bait', f'{outside}/new')",
    "os.symlink(outside, 'way'); open('way/new', 'w').close()",
    "os.symlink('kept', f'{outside}/link')",
    "os.chmod(f'{outside}/kept', 0o777)",
    "os.chown(f'{outside}/kept', os.getuid(), os.getgid())",
    "os.utime(f'{outside}/kept', (1, 1))",
    "os.setxattr(f'{outside}/kept', 'user.mine', b'1')  # not outside: some file systems have none",
    "os.mkdir(f'{outside}/folder')",
    "os.mkfifo(f'{outside}/fifo')",
    "os.chdir(outside); open('new', 'w').close()",
    "there = os.open(outside, os.O_PATH); os.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=there)",
    "open(f'/proc/self/root{outside}/new', 'w').close()",
    "open('/dev/shm/jaxchat-hostile', 'w').close(); os.remove('/dev/shm/jaxchat-hostile')",
    "open(os.__file__, 'a').close()  # not outside: others may own it",
    "assert os.listdir(outside)",
    "assert open(f'{outside}/inner/secret').read()",
    "assert open('/etc/passwd').read()",
    # what we know: our environment, memory, open files, terminal
    "assert os.environ['JAXCHAT_SECRET']  # not outside: -I keeps it, but so would any Python",
    "assert b'JAXCHAT' in open(f'/proc/{parent}/environ', 'rb').read()  # not outside: set after it began",
    "assert open('/proc/self/environ', 'rb').read()",
    "assert os.listdir('/proc')",
    "open(f'/proc/{parent}/mem', 'rb+')  # not outside: not everyone may",
    "assert os.listdir(f'/proc/{parent}/fd')",
    "assert input()",
    "import sys; assert len(sys.argv) > 1 and sys.argv[1] == 'nothing of ours'  # not outside",
    "held = [fd for fd in range(3, 1024) if not os.set_blocking(fd, False)]; os.read(held[0], 1)  # not outside",
    # processes
    "if os.fork() == 0: os._exit(0)",
    "if os.fork() == 0:  # not outside\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        import time; time.sleep(60)\n"
    "    os._exit(0)",
    "import subprocess; subprocess.run(['true'], check=True)",
    "assert os.system('true') == 0",
    "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
    "os.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {})",
    "import sys; os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    SYSCALL
    + "child = libc.syscall(57)\nassert child >= 0\nif child == 0: os._exit(0)  # not outside: fork, on x86-64 only",
    SYSCALL
    + "child = libc.syscall(56, 72, 0, 0, 0, 0)\nassert child >= 0\nif child == 0: os._exit(0)  # not outside: clone",
    SYSCALL + "assert libc.unshare(0x10000000) == 0  # not outside: a namespace of users; not everywhere allowed",
    SYSCALL + "assert libc.mount(b'none', b'.', b'tmpfs', 0, 0) == 0  # not outside",
    "file = os.memfd_create('code')",
    SYSCALL + "assert libc.syscall(425, 8, ctypes.create_string_buffer(200)) >= 0  # not outside: io_uring",
    # signals, tracing, limits of others
    "import signal; os.kill(parent, signal.SIGUSR1)",
    "import signal; os.killpg(os.getpgid(parent), 0)",
    "import signal; signal.pidfd_send_signal(os.pidfd_open(parent), signal.SIGUSR1)",
    "import fcntl, signal, time\n"
    "ours, other = os.pipe()\n"
    "fcntl.fcntl(ours, fcntl.F_SETOWN, parent), fcntl.fcntl(ours, fcntl.F_SETSIG, signal.SIGUSR1)\n"
    "fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC), os.write(other, b'x')",
    SYSCALL + "assert libc.ptrace(0x4206, parent, 0, 0) == 0  # not outside: not everyone may",
    SYSCALL + "assert libc.process_vm_readv(parent, 0, 0, 0, 0, 0) >= 0",
    "import resource; resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0))  # not outside: it would stay so",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))  # not outside",
    "os.setpriority(os.PRIO_PROCESS, parent, 19)  # not outside: it would stay so",
    "os.sched_setaffinity(parent, {0})  # not outside: it would stay so",
    # the network
    "socket.create_connection(('127.0.0.1', port))",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen()",
    "socket.socket(socket.AF_UNIX).connect(name)",
    "socket.socket(socket.AF_UNIX).connect(f'{outside}/socket')",
    "socket.socketpair()",
    "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{port}')  # not outside",
    "assert socket.getaddrinfo('example.com', 80)  # not outside: needs a network",
    SYSCALL + "assert libc.socket(2, 1, 0) >= 0",
]

RUNAWAYS = [
    "while True: pass",
    "import time; time.sleep(1000)",
    "9 ** 9 ** 9",
    "import re; re.match('(a*)*b', 'a' * 40)",
    "import signal\n"
    "for n in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(n, signal.SIG_IGN)\n"
    "while True: pass",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "while True:\n    try: os.fork()\n    except OSError: pass",
    "import threading\ndef more():\n    threading.Thread(target=more).start(); more()\nmore()",
    "import threading\nwhile True: threading.Thread(target=lambda: __import__('time').sleep(1000)).start()",
    "import threading, time\nthreading.stack_size(2**15)\n"
    "for _ in range(1000): threading.Thread(target=time.sleep, args=(9,)).start()\ntime.sleep(9)",
    "kept = []\nwhile True: kept.append(bytearray(2**20))",
    "kept = 'x'\nwhile True: kept += kept",
    "import mmap\nkept = [mmap.mmap(-1, 2**30) for _ in range(1000)]",
    "import sys; sys.setrecursionlimit(10**9)\ndef deeper(): deeper()\ndeeper()",
    "import sys; sys.setrecursionlimit(10**9)\nclass Deep:\n    def __repr__(self): return repr(self)\nrepr(Deep())",
    "import sys\nwhile True: print('x' * 10**6), print('x' * 10**6, file=sys.stderr)",
    "while True: os.write(3, b'+' * 1000)",
    "for n in range(10**9): open(str(n), 'w').close()",
    "for n in range(10**9):\n    with open(str(n), 'wb') as file: file.write(bytes(2**23))",
    "with open('large', 'wb') as file:\n    while True: file.write(bytes(2**20))",
    "files = [open(str(n), 'wb') for n in range(10**6)]",
    "raise Exception('x' * 10**8)",
    "class Slow(Exception):\n    def __str__(self):\n        while True: pass\nraise Slow",
    "eval('(' * 10**5 + ')' * 10**5)",
    "import atexit\n@atexit.register\ndef stay():\n    while True: pass\nraise SystemExit",
    "os.closerange(0, 1000)\nwhile True: pass",
]

LEAVERS = [
    "import sys; sys.exit(0)",
    "os._exit(0)",
    "raise SystemExit(0)",
    "raise KeyboardInterrupt",
    "exit(0)",
    "import signal; signal.raise_signal(signal.SIGTERM); raise SystemExit",
    "os.abort()",
    "ctypes.string_at(0)",
    "os.write(3, b'passed'); os._exit(0)",
    "os.close(3)",
    "os.closerange(0, 1000)",
    "os.dup2(os.open(os.devnull, os.O_WRONLY), 3)",
    "import threading; threading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
    "import builtins; builtins.exec = print; raise SystemExit",
]
