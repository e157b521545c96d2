"""A filter of system calls that code of a model has no use for."""

import errno
import tempfile
from types import ModuleType
from typing import IO

DENIED = tuple(
    """acct add_key bpf chroot delete_module fanotify_init finit_module fsconfig fsmount fsopen
    fspick init_module io_uring_enter io_uring_register io_uring_setup kexec_file_load kexec_load
    keyctl mount move_mount name_to_handle_at open_by_handle_at open_tree perf_event_open pivot_root
    process_vm_readv process_vm_writev ptrace quotactl reboot request_key setns swapoff swapon
    umount2 unshare userfaultfd""".split()  # noqa: SIM905
)


def find_binding() -> ModuleType | None:
    """Return a Python binding of libseccomp: pyseccomp, or that of the distribution."""
    try:
        import pyseccomp

        return pyseccomp
    except (ImportError, RuntimeError, OSError):  # without libseccomp, it fails as it is imported
        pass
    try:
        import seccomp

        return seccomp
    except ImportError:
        return None


def write_filter(binding: ModuleType) -> IO[bytes]:
    """Return an open file with the filter as the kernel reads it: the denied calls fail."""
    rules = binding.SyscallFilter(defaction=binding.ALLOW)
    for name in DENIED:
        if binding.resolve_syscall(binding.Arch.NATIVE, name) >= 0:  # of this kind of processor
            rules.add_rule(binding.ERRNO(errno.EPERM), name)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    rules.export_bpf(file)
    file.seek(0)
    return file
