"""``twistd cafeorch``: its options, and the one place where the parts are put together."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from twisted.application.service import IService
from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ServerEndpoint,
    TCP6ServerEndpoint,
    UNIXServerEndpoint,
    serverFromString,
)
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.logger import LogLevel
from twisted.python import usage
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile

from . import __version__
from .factory import OrchestratorFactory
from .framing import DEFAULT_MAX_FRAME_BYTES, FRAMINGS, Framing
from .logs import BufferedLogObserver, Render, as_json, as_text
from .service import DEFAULT_DRAIN_TIMEOUT, OrchestratorService
from .sinks.database import StoreError, check_store
from .sinks.sqlite import SqliteSink
from .systemd import SystemdNotifier

ENVIRONMENT_PREFIX = "CAFEORCH_"


def _number(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Not "outside of": a NaN is that neither.
        if value is None or not least <= value <= most:
            raise ValueError(f"{text!r} is not a number from {least} to {most}")
        return value

    return parse


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else parse(text)


def _log_level(text: str) -> Any:
    levels = {"debug": LogLevel.debug, "info": LogLevel.info}
    levels |= {"warn": LogLevel.warn, "error": LogLevel.error}
    if text not in levels:
        raise ValueError(f"{text!r} is not one of {', '.join(levels)}")
    return levels[text]


def _log_format(text: str) -> Render:
    formats = {"text": as_text, "json": as_json}
    if text not in formats:
        raise ValueError(f"{text!r} is not one of {', '.join(formats)}")
    return formats[text]


def _store(text: str) -> str | None:
    return None if text == "none" else str(Path(text).absolute())


def _framing(text: str) -> Framing | None:
    if text not in {"auto", *FRAMINGS}:
        raise ValueError(f"{text!r} is not one of auto, {', '.join(FRAMINGS)}")
    return FRAMINGS.get(text)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "port": _number(int, 0, 65535),
    "interface": str,
    "backlog": _number(int, 1, 65535),
    "store": _store,
    "max-frame-bytes": _number(int, 1, 2**31 - 1),
    "framing": _framing,
    "max-connections": _number(int, 1, 10**6),
    "max-connections-per-host": _or_none(_number(int, 1, 10**6)),
    "drain-timeout": _number(float, 0, 86400),
    "log-level": _log_level,
    "log-format": _log_format,
}
_REPEATED = ("listen", "processors")
_TCP_OPTIONS = {"port", "interface", "backlog"}


class Options(usage.Options):
    """The options of ``twistd cafeorch``, from the command line and the environment."""

    synopsis = "[options]"
    longdesc = (
        "Takes tables from coffee-shop agencies over TCP, batch by batch, and acknowledges each"
        " batch when it is on disk. Each option can also come from the environment: CAFEORCH_"
        " and its name in capitals, dashes as underscores (CAFEORCH_LOG_LEVEL=debug); several"
        " values are separated by white space. The command line wins. twistd's own options (-n"
        " to stay in the foreground, --logfile, --pidfile, ...) go before the word cafeorch."
    )
    optParameters = [  # noqa: RUF012 (Twisted's way of saying it)
        ["port", "p", "8080", "TCP port; 0 picks one, and the log says which"],
        ["interface", "i", "127.0.0.1", "address to bind; 0.0.0.0 or :: for all"],
        ["backlog", "b", "128", "pending connections"],
        ["store", "s", "cafeorch.sqlite3", "the embedded store's file, or none"],
        ["max-frame-bytes", None, str(DEFAULT_MAX_FRAME_BYTES), "longest frame, in bytes"],
        [
            "framing",
            None,
            "auto",
            "auto (told by a connection's first byte), int32 or opcode-first",
        ],
        ["max-connections", None, "1000", "connections at once; more are closed as they come"],
        ["max-connections-per-host", None, "none", "the same of one address, or none"],
        [
            "drain-timeout",
            None,
            f"{DEFAULT_DRAIN_TIMEOUT:g}",
            "seconds that a stop may take to finish the batches in hand",
        ],
        ["log-level", None, "info", "debug, info, warn or error"],
        ["log-format", None, "text", "text, or json: an object a line"],
    ]

    def __init__(self) -> None:
        super().__init__()
        self._repeated: dict[str, list[str]] = {}

    def opt_listen(self, description: str) -> None:
        """Twisted endpoint (unix:, systemd:) in place of -p, -i and -b; may be repeated"""
        self._repeated.setdefault("listen", []).append(description)

    opt_l = opt_listen

    def opt_processors(self, name: str) -> None:
        """module:function, called at start; looked for in . first; may be repeated"""
        self._repeated.setdefault("processors", []).append(name)

    def opt_version(self) -> None:
        """Display the version and exit."""
        print(f"cafeteria_orch {__version__}")
        sys.exit(0)

    def parseArgs(self, *arguments: str) -> None:
        """Refuse what is no option."""
        if arguments:
            raise usage.UsageError(f"{arguments[0]!r} is no option, and nothing else is taken")

    def parseOptions(self, options: list[str] | None = None) -> None:
        """Read the command line, then the environment for what it does not say.

        :raises SystemExit: with one line that names the mistake.
        """
        defaults = {name: parse(self.defaults[name]) for name, parse in _PARSERS.items()}
        defaults |= {name: [] for name in _REPEATED}
        try:
            given = self._read(options, "--{}".format)
            environment = self._read(_environment_arguments(), _environment_name)
        except usage.UsageError as error:
            raise _exit(str(error)) from error
        for options_of, label in ((given, "--{}".format), (environment, _environment_name)):
            clash = sorted(options_of.keys() & _TCP_OPTIONS)
            if clash and "listen" in options_of:
                what = f"{label('listen')} takes the place of {label(clash[0])}"
                raise _exit(f"{what}: give one of them")
        if given.keys() & _TCP_OPTIONS:
            environment.pop("listen", None)
        self.update(defaults | environment | given)

    def _read(self, options: list[str] | None, label: Callable[[str], str]) -> dict[str, Any]:
        self.update(dict.fromkeys(_PARSERS))
        self._repeated = {}
        super().parseOptions(options)
        given: dict[str, Any] = dict(self._repeated)
        for name, parse in _PARSERS.items():
            if self[name] is not None:
                try:
                    given[name] = parse(self[name])
                except ValueError as error:
                    raise usage.UsageError(f"{label(name)}: {error}") from error
        return given


def makeService(options: Options) -> IService:
    """Put the server together, having made sure that it can start.

    Whatever is wrong is found here: a daemonising ``twistd`` has not forked yet, and can
    still say so.

    :raises SystemExit: with one line that names the mistake.
    """
    # Importing it installs it, and which one it is is for twistd to say.
    from twisted.internet import reactor  # noqa: PLC0415

    try:
        factory = OrchestratorFactory(
            reactor,
            max_frame_bytes=options["max-frame-bytes"],
            framing=options["framing"],
            max_connections=options["max-connections"],
            max_connections_per_host=options["max-connections-per-host"],
            log_level=options["log-level"],
        )
    except ValueError as error:
        raise _exit(str(error)) from error
    sink = None
    if options["store"] is not None:
        try:
            check_store(options["store"])
        except StoreError as error:
            raise _exit(str(error)) from error
        sink = SqliteSink(reactor, options["store"])
        sink.register(factory)
    for name in options["processors"]:
        _load_processors(name, factory)
    _probe(_endpoints(_BindProbe(), options))
    return OrchestratorService(
        reactor,
        factory,
        _endpoints(reactor, options),
        sink=sink,
        drain_timeout=options["drain-timeout"],
        log_observer=_log_observer(reactor, options),
        notifier=SystemdNotifier.from_environment(os.environ),
    )


def _exit(message: str) -> SystemExit:
    return SystemExit(f"cafeorch: {message}")


def _environment_name(option: str) -> str:
    return ENVIRONMENT_PREFIX + option.upper().replace("-", "_")


def _environment_arguments() -> list[str]:
    arguments = []
    for name in (*_PARSERS, *_REPEATED):
        value = os.environ.get(_environment_name(name), "")
        values = value.split() if name in _REPEATED else filter(None, [value])
        arguments += [f"--{name}={value}" for value in values]
    return arguments


def _endpoints(reactor: Any, options: Options) -> list[IStreamServerEndpoint]:
    if not options["listen"]:
        interface = options["interface"]
        kind = TCP6ServerEndpoint if ":" in interface else TCP4ServerEndpoint
        return [kind(reactor, options["port"], options["backlog"], interface)]
    endpoints = []
    for description in options["listen"]:
        try:
            endpoints.append(serverFromString(reactor, description))
        except Exception as error:
            raise _exit(f"--listen {description}: {_one_line(error)}") from error
    return endpoints


def _probe(endpoints: Iterable[IStreamServerEndpoint]) -> None:
    for endpoint in endpoints:
        if isinstance(endpoint, _PROBED):
            failures: list[Failure] = []
            endpoint.listen(None).addErrback(failures.append)
            for failure in failures:
                raise _exit(
                    f"{failure.getErrorMessage()} Stop what listens there, or choose another"
                    " --port, --interface or --listen."
                )


_PROBED = (TCP4ServerEndpoint, TCP6ServerEndpoint, SSL4ServerEndpoint, UNIXServerEndpoint)


class _BindProbe:
    """What an endpoint takes for a reactor: binds as the real one would, and lets go."""

    def listenTCP(
        self,
        port: int,
        factory: None,
        backlog: int,
        interface: str,
    ) -> None:
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((interface, port))
            except OSError as error:
                raise CannotListenError(interface, port, error) from error

    def listenSSL(
        self,
        port: int,
        factory: None,
        contextFactory: object,
        backlog: int,
        interface: str,
    ) -> None:
        self.listenTCP(port, factory, backlog, interface)

    def listenUNIX(self, address: str, factory: None, **_: object) -> None:
        folder = Path(address).absolute().parent
        if not os.access(folder, os.W_OK):
            raise CannotListenError(None, address, OSError(f"{folder} is not writable"))
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(address)
            raise CannotListenError(None, address, OSError("Address already in use"))


def _load_processors(name: str, factory: OrchestratorFactory) -> None:
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise _exit(f"--processors {name}: give it as package.module:function")
    if sys.path[:1] != [str(Path.cwd())]:
        sys.path.insert(0, str(Path.cwd()))
    try:
        register = getattr(importlib.import_module(module_name), function_name)
        register(factory)
    except Exception as error:
        raise _exit(f"--processors {name}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _log_observer(reactor: Any, options: Options) -> BufferedLogObserver | None:
    """Our observer, on the file that twistd would log to; its own where it is told another.

    ``twist``, which has no such options, sets up logging of its own.
    """
    twistd = options.parent
    if twistd is None or "nodaemon" not in twistd or twistd["logger"] or twistd.get("syslog"):
        return None
    foreground = twistd["nodaemon"] or twistd["debug"]
    path = twistd["logfile"] or ("-" if foreground else "twistd.log")
    if path == "-":
        if not foreground:
            raise _exit("a daemon has no standard output to log to: name a --logfile, or say -n")
        return BufferedLogObserver(sys.stdout, options["log-level"], options["log-format"])
    try:
        file = LogFile.fromFullPath(path)
    except OSError as error:
        raise _exit(f"--logfile {path}: {error.strerror}") from error
    observer = BufferedLogObserver(file, options["log-level"], options["log-format"])
    _rotate_on_signal(reactor, observer)
    return observer


def _rotate_on_signal(reactor: Any, observer: BufferedLogObserver) -> None:
    """SIGUSR1 rotates the log, as with twistd's own observer."""

    def rotate(_: int, __: FrameType | None) -> None:
        reactor.callFromThread(observer.rotate)

    if not signal.getsignal(signal.SIGUSR1):
        signal.signal(signal.SIGUSR1, rotate)
