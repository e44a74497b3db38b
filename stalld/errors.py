"""Errors that reach a user: each says what is wrong and what to do next."""

import errno


class StalldError(Exception):
    """A foreseeable fault: the message names the thing and the remedy.

    Attributes:
        exit_code: what the command exits with when this ends it.
    """

    exit_code = 1


def no_thread(error: RuntimeError) -> OSError:
    """What ``Thread.start`` means when it says that it cannot: to be tried again."""
    return OSError(errno.EAGAIN, f"{error}: is TasksMax= of our unit too small?")


def reason_of(error: Exception) -> str:
    """Why, in a few words, for a count of errors: the kernel's reason, where there is one."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "not understood"


class UsageError(StalldError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file is wrong: one argument, and one line of the message, per error."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class ProbeError(StalldError):
    """The BPF programs could not be compiled, loaded or attached."""


class MissingAbilityError(ProbeError):
    """This host lacks something the service cannot do without."""


class DecodeError(StalldError):
    """A perf-buffer record that does not follow ``bpf/records.h``."""
