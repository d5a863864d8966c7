"""Inner side of the code sandbox: shuts this process off, then runs one program in a child of it.

- Started by `code_sandbox` as a script, by the interpreter without packages. Standard library
  alone: nothing of this project is on its import path.
- With namespaces: no network, no process but its own, and a file system of the interpreter, read
  only, with one writable folder of bounded size in memory. All privileges are given up.
- Process 1 of these namespaces only waits. When it ends, the kernel kills what is left.
- Without namespaces an audit hook refuses files, sockets, processes and signals. Code that reaches
  behind Python gets around it.

Alternatives considered:
- `bwrap`, `firejail` or a container: a better wall, where one is installed and may be used.
- `pivot_root`: hides the old root as well; after `chroot` a process without privileges cannot leave
  either, and the kernel then refuses it namespaces of its own.

Source: namespaces(7), user_namespaces(7), mount_setattr(2), capset(2), prctl(2) of Linux.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
NAMESPACES = NEW_MOUNTS | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES = 0x1000, 0x4000, 0x40000, 0x2, 0x4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY, ATTR_NO_SUID = 442, -100, 0x8000, 0x1, 0x2
DEATH_SIGNAL, DUMPABLE, SECCOMP, NO_NEW_PRIVILEGES = 1, 4, 22, 38
SECCOMP_FILTER = 2
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
FIRST_USER = 1_800_000_000
"""Numbers of users from here on belong to nobody."""
OWN_FOLDER = "/program"
"""The one writable folder in the namespaces, in memory."""
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
SYSTEM_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
SETUP_FAILED = 97
"""Exit code when the namespaces cannot be made; the reason is on the verdict pipe."""

Job = dict[str, Any]


def main() -> None:
    """Read the job from stdin, run its program, and end."""
    verdict, caller = int(sys.argv[1]), int(sys.argv[2])
    # The caller may be killed at any time, even before this.
    _libc_call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != caller:
        return
    job: Job = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    if job["namespaces"]:
        try:
            _enter_namespaces(job["folder"], job["folder_bytes"])
            _refuse_calls(bytes.fromhex(job["refused_calls"]))
        except OSError as error:
            os.write(verdict, f"unavailable {error.strerror or error}".encode())
            os._exit(SETUP_FAILED)
    init = os.fork()
    if init == 0:
        _init(job, verdict)
    os.close(verdict)
    os._exit(_code(os.waitpid(init, 0)[1]))


def _code(status: int) -> int:
    """Exit code of a wait status, as shells number signals."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _init(job: Job, verdict: int) -> NoReturn:
    """Process 1 of the namespaces: start the program, wait for it, end."""
    program = os.fork()
    if program == 0:
        _program(job, verdict)
    os.close(verdict)
    # Only the caller may hold the pipe of the output open.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    _libc_call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    while True:
        ended, status, usage = os.wait3(0)
        if ended == program:
            spent = usage.ru_utime + usage.ru_stime
            # A program may ignore the first signal; the second one does not say what it is for.
            late = os.WIFSIGNALED(status) and spent >= job["cpu_seconds"]
            os._exit(128 + signal.SIGXCPU if late else _code(status))


def _program(job: Job, verdict: int) -> NoReturn:
    """Run the program under its limits, and say how it ended."""
    # Taken here: a program may replace them.
    write, leave, own_id, own = os.write, os._exit, os.getpid, os.getpid()
    source, secret = job.pop("source"), job.pop("secret")
    _libc_call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _limit(job)
    if job["namespaces"]:
        os.setpgid(0, 0)
    else:
        os.chdir(job["folder"])
        _own_user(job["folder"])
        sys.addaudithook(_hook(os.path.realpath(job["folder"])))

    answer = f"passed {secret}"
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        answer = f"failed {type(error).__name__}: {_text(error)}"
    if own_id() == own:
        write(verdict, answer.encode(errors="replace")[:1000])
    # Threads, and what a program has registered for its exit, are not waited for.
    leave(0)
    raise AssertionError("the process has ended")


def _own_user(folder: str) -> None:
    """Become a user of its own, where this process is root and may."""
    if os.geteuid() != 0 or not _everyone_reads(os.path.dirname(os.__file__)):
        return
    own = FIRST_USER + os.getpid()
    try:
        os.chown(folder, own, own)
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    except OSError:
        # A container without that privilege.
        return
    # A change of user clears it.
    _libc_call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _everyone_reads(path: str) -> bool:
    """Whether any user may read a folder, and go through those above it."""
    while path != "/":
        if os.stat(path).st_mode & 0o005 != 0o005:
            return False
        path = os.path.dirname(path)
    return True


def _text(error: BaseException) -> str:
    try:
        return str(error).split("\n")[0]
    except BaseException:
        return "an exception that cannot be shown"


def _limit(job: Job) -> None:
    """Set the limits of this process, which its children inherit."""
    seconds = int(job["cpu_seconds"])
    limits = {
        "RLIMIT_CPU": (seconds, seconds + 1),
        "RLIMIT_AS": (job["memory_bytes"],) * 2,
        "RLIMIT_FSIZE": (job["folder_bytes"],) * 2,
        "RLIMIT_NOFILE": (job["open_files"],) * 2,
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MEMLOCK": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
    }
    if job["namespaces"]:
        # Elsewhere all processes of the user count, and a program may start none.
        limits["RLIMIT_NPROC"] = (job["processes"],) * 2
    for name, (soft, hard) in limits.items():
        if (number := getattr(resource, name, None)) is not None:
            _, most = resource.getrlimit(number)
            bound = hard if most == resource.RLIM_INFINITY else min(hard, most)
            resource.setrlimit(number, (min(soft, bound), bound))


def _enter_namespaces(folder: str, folder_bytes: int) -> None:
    """Shut this process off, with `folder` as the place of its new root. Raises OSError."""
    root = os.geteuid() == 0
    user, group = os.getuid(), os.getgid()
    _checked("unshare", NAMESPACES if root else NAMESPACES | NEW_USER)
    if not root:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as stream:
                stream.write(text)

    _new_root(folder, folder_bytes)
    os.chroot(folder)
    os.chdir(OWN_FOLDER)
    if root:
        # A user of its own: limits on processes are counted by user, and hold for none that is 0.
        own = FIRST_USER + os.getpid()
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    _drop_privileges()


def _new_root(folder: str, folder_bytes: int) -> None:
    """Mount a root of the interpreter alone, read-only, with a writable folder in memory."""
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", folder, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    folders = [*SYSTEM_FOLDERS, os.path.realpath(sys.base_prefix)]
    folders += [os.path.realpath(sys.base_exec_prefix)]
    for path in dict.fromkeys(folders):
        target = folder + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path) and not os.path.exists(target):
            os.makedirs(target)
            _mount(path, target, None, BIND | RECURSIVE)
    for path in SYSTEM_FILES:
        if os.path.exists(path):
            os.makedirs(os.path.dirname(folder + path), exist_ok=True)
            with open(folder + path, "w"):
                pass
            _mount(path, folder + path, None, BIND)

    os.mkdir(folder + OWN_FOLDER)
    attributes = struct.pack("QQQQ", ATTR_READ_ONLY | ATTR_NO_SUID, 0, 0, 0)
    where = (AT_FDCWD, folder.encode(), AT_RECURSIVE, attributes, len(attributes))
    _checked("syscall", MOUNT_SETATTR, *where)
    size = f"size={folder_bytes},nr_inodes=4096,mode=1777"
    _mount("tmpfs", folder + OWN_FOLDER, "tmpfs", NO_SUID | NO_DEVICES, size)


def _drop_privileges() -> None:
    """Give up every capability, and the way to gain some."""
    _checked("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)
    _checked("capset", header, nothing)
    _checked("prctl", DUMPABLE, 0, 0, 0, 0)
    # A change of user clears it.
    _checked("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _refuse_calls(instructions: bytes) -> None:
    """Set a filter of system calls, which all children inherit; nothing where it is empty."""
    if instructions:
        content = ctypes.create_string_buffer(instructions, len(instructions))
        program = struct.pack("HP", len(instructions) // 8, ctypes.addressof(content))
        _checked("prctl", SECCOMP, SECCOMP_FILTER, program, 0, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _checked("mount", *texts, ctypes.c_ulong(flags), data.encode())


def _checked(name: str, *arguments: Any) -> None:
    """Call a function of libc. Raises OSError with its error."""
    if _libc_call(name, *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _libc_call(name: str, *arguments: Any) -> int:
    """Call a function of libc; -1 where this system has none of that name."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    return -1 if function is None else int(function(*arguments))


REFUSED_EVENTS = (
    *("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.startfile"),
    *("os.kill", "signal.", "socket.", "subprocess.", "ctypes.", "pty.", "fcntl.", "mmap."),
    *("os.putenv", "os.unsetenv", "os.chdir", "os.chroot", "os.fchdir", "syslog.", "winreg."),
    *(
        "sqlite3.",
        "urllib.",
        "ftplib.",
        "smtplib.",
        "poplib.",
        "imaplib.",
        "nntplib.",
        "telnetlib.",
    ),
    *("resource.", "sys.addaudithook", "code.__new__", "gc.", "webbrowser."),
)
REFUSED_IMPORTS = {
    *("_ctypes", "ctypes", "_posixsubprocess", "_multiprocessing", "_testcapi", "_dbm", "_gdbm"),
    *("_posixshmem", "readline", "_curses"),
}
PATH_EVENTS = (
    *("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir"),
    *("os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.lchown"),
    *("os.setxattr", "os.removexattr", "os.lchflags", "os.chflags", "os.mkfifo", "os.mknod"),
    *("shutil.", "glob.", "tempfile.", "os.walk", "os.fwalk", "pathlib."),
)


def _hook(folder: str) -> Any:
    """Return an audit hook that lets a program compute, and use `folder`; the rest it refuses."""
    inside = folder + os.sep
    readable = tuple(os.path.realpath(path) + os.sep for path in (sys.base_prefix, sys.prefix))
    real_path, file_system_path = os.path.realpath, os.fsdecode
    reading = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)

    def allowed(path: Any, flags: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        real = real_path(file_system_path(path))
        if real == folder or real.startswith(inside):
            return True
        return flags == reading and real.startswith(readable)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED_EVENTS):
            raise PermissionError(f"{event} is not allowed here")
        if event == "import" and arguments[0] in REFUSED_IMPORTS:
            raise PermissionError(f"import of {arguments[0]} is not allowed here")
        if event.startswith(PATH_EVENTS):
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else ()
            flags = arguments[2] if event == "open" else reading
            looks = event in ("open", "os.listdir", "os.scandir")
            for path in paths or arguments[:1]:
                if not allowed(path, flags if looks else None):
                    raise PermissionError(f"{event} is not allowed outside of its own folder")

    return hook


if __name__ == "__main__":
    main()
