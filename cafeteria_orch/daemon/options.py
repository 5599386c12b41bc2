"""The options of ``twistd cafeorch``, from the command line and the environment."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twisted.logger import Logger, LogLevel
from twisted.python import usage

from cafeteria_orch import __version__
from cafeteria_orch.common.arguments import number
from cafeteria_orch.edge.proxy import parse_networks
from cafeteria_orch.observe.log_files import DEFAULT_LOG_BYTES, DEFAULT_LOG_FILES
from cafeteria_orch.observe.logs import Render, as_json, as_text
from cafeteria_orch.server.memory import DEFAULT_MAX_IN_FLIGHT_BYTES
from cafeteria_orch.store.location import absolute, has_password, shown_location
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES, FRAMINGS, Framing

from .environment import unknown_variables, variable
from .mistakes import suggestion_for
from .node import DEFAULT_NODE, node_name
from .service import DEFAULT_DRAIN_TIMEOUT

_log = Logger()


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


def _path(text: str) -> str:
    # A daemon changes its working directory, and so does --rundir.
    return str(Path(text).absolute())


def _flag(text: str) -> bool:
    words = {"1": True, "yes": True, "true": True, "on": True}
    words |= {"0": False, "no": False, "false": False, "off": False}
    if text.lower() not in words:
        raise ValueError(f"{text!r} is not one of {', '.join(words)}")
    return words[text.lower()]


def _framing(text: str) -> Framing | None:
    if text not in {"auto", *FRAMINGS}:
        raise ValueError(f"{text!r} is not one of auto, {', '.join(FRAMINGS)}")
    return FRAMINGS.get(text)


_seconds = number(float, 0.001, 10**6)

_PARSERS: dict[str, Callable[[str], Any]] = {
    "port": number(int, 0, 65535),
    "interface": str,
    "backlog": number(int, 1, 65535),
    "node": node_name,
    "store": _or_none(absolute),
    "store-patience": number(float, 0, 10**6),
    "tls-cert": _or_none(_path),
    "tls-key": _or_none(_path),
    "tls-client-ca": _or_none(_path),
    "agencies": _or_none(_path),
    "proxy-from": parse_networks,
    "max-frame-bytes": number(int, 1, 2**31 - 1),
    "framing": _framing,
    "max-connections": number(int, 1, 10**6),
    "max-connections-per-host": _or_none(number(int, 1, 10**6)),
    "max-in-flight-bytes": number(int, 1, 2**40),
    "idle-timeout": _or_none(_seconds),
    "frame-timeout": _seconds,
    "processing-timeout": _or_none(_seconds),
    "drain-timeout": number(float, 0, 86400),
    "metrics": _or_none(str),
    "log-level": _log_level,
    "log-format": _log_format,
    "log-bytes": _or_none(number(int, 4096, 2**40)),
    "log-files": number(int, 1, 1000),
}
_REPEATED = ("listen", "processors")
_FLAGS = ("proxy-protocol", "reuse-port")
_NEEDED = {
    "tls-key": "tls-cert",
    "tls-client-ca": "tls-cert",
    "agencies": "tls-client-ca",
    "proxy-from": "proxy-protocol",
}
"""Options, and the one that each of them needs."""
_TCP_OPTIONS = {"port", "interface", "backlog"}
_ALWAYS_SHOWN = ("port", "interface", "store", "metrics")


class Setting(NamedTuple):
    """An option as it holds.

    :ivar source: where its value comes from.
    """

    option: str
    value: str
    source: str


class Options(usage.Options):
    """The options of ``twistd cafeorch``, from the command line and the environment.

    :ivar environment: its variables.
    """

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
        ["backlog", "b", "128", "connections that wait to be accepted"],
        ["node", None, DEFAULT_NODE, "this server's name among several; %H is the host's"],
        [
            "tls-cert",
            None,
            "none",
            "certificate and its chain, PEM, for TLS alone; or none",
        ],
        ["tls-key", None, "none", "its private key, PEM; none: it is in the file of --tls-cert"],
        [
            "tls-client-ca",
            None,
            "none",
            "CAs, PEM: each client must have a certificate of one of them; or none",
        ],
        [
            "agencies",
            None,
            "none",
            "lines: common name = agency id; other certificates are refused; or none",
        ],
        [
            "proxy-from",
            None,
            "127.0.0.0/8,::1",
            "networks of the load balancers (CIDR,...): others may use local sockets only",
        ],
        ["store", "s", "cafeorch.sqlite3", "a file (SQLite), a postgresql:// URL, or none"],
        [
            "store-patience",
            None,
            "30",
            "seconds that batches wait while the store takes nothing, before they get FAIL",
        ],
        ["max-frame-bytes", None, str(DEFAULT_MAX_FRAME_BYTES), "limit of a frame, in bytes"],
        [
            "framing",
            None,
            "auto",
            "auto (told by a connection's first byte), int32 or opcode-first",
        ],
        [
            "max-connections",
            None,
            "1000",
            "limit of connections; further ones are closed",
        ],
        ["max-connections-per-host", None, "none", "the same for one address, or none"],
        [
            "max-in-flight-bytes",
            None,
            str(DEFAULT_MAX_IN_FLIGHT_BYTES),
            "memory budget: bytes of all frames that are not processed yet",
        ],
        ["idle-timeout", None, "none", "seconds that a client may send nothing, or none"],
        [
            "frame-timeout",
            None,
            "30",
            "seconds from the first byte of a frame to its last",
        ],
        [
            "processing-timeout",
            None,
            "60",
            "seconds until a message in progress is answered with FAIL, try again later; or none",
        ],
        [
            "drain-timeout",
            None,
            f"{DEFAULT_DRAIN_TIMEOUT:g}",
            "seconds that a stop may take to finish the messages in progress",
        ],
        [
            "metrics",
            None,
            "none",
            "Twisted endpoint (tcp:9100:interface=127.0.0.1) of the status page, or none",
        ],
        ["log-level", None, "info", "debug, info, warn or error"],
        ["log-format", None, "text", "text, or json: an object a line"],
        [
            "log-bytes",
            None,
            str(DEFAULT_LOG_BYTES),
            "size at which the file of --logfile is rotated, or none",
        ],
        ["log-files", None, str(DEFAULT_LOG_FILES), "rotated files that are kept"],
    ]

    def __init__(self) -> None:
        super().__init__()
        self.environment: Mapping[str, str] = os.environ
        self._collected: dict[str, Any] = {}
        self._settings: dict[str, Setting] = {}
        self._changed: list[str] = []

    def settings(self) -> list[Setting]:
        """The options that are set, and the most important of the others; without passwords."""
        settings = self._settings.copy()
        for name in _ALWAYS_SHOWN:
            if not (name in _TCP_OPTIONS and self["listen"]):
                settings.setdefault(name, Setting(f"--{name}", self.defaults[name], "default"))
        settings["store"] = settings["store"]._replace(value=shown_location(self["store"]))
        return [settings[name] for name in sorted(settings)]

    def opt_listen(self, description: str) -> None:
        """Twisted endpoint (unix:, systemd:) in place of -p, -i and -b; may be repeated"""
        self._collected.setdefault("listen", []).append(description)

    opt_l = opt_listen

    def opt_processors(self, name: str) -> None:
        """module:function, called at start; found in . first; may be repeated"""
        self._collected.setdefault("processors", []).append(name)

    def opt_proxy_protocol(self) -> None:
        """A load balancer names its client: PROXY protocol, version 1 or 2, before TLS"""
        self._collected["proxy-protocol"] = True

    def opt_reuse_port(self) -> None:
        """Share the TCP port with other servers of this machine (SO_REUSEPORT)"""
        self._collected["reuse-port"] = True

    opt_h = usage.Options.opt_help

    def opt_version(self) -> None:
        """Display the version and exit."""
        print(f"cafeteria_orch {__version__}")
        sys.exit(0)

    def parseArgs(self, *arguments: str) -> None:
        """Refuse arguments that are not options."""
        if arguments:
            raise usage.UsageError(f"{arguments[0]!r} is not an option")

    def parseOptions(self, options: list[str] | None = None) -> None:
        """Read the command line, then the environment for options that it lacks.

        :raises SystemExit: with one line that names the mistake.
        """
        defaults = {name: parse(self.defaults[name]) for name, parse in _PARSERS.items()}
        defaults |= {name: [] for name in _REPEATED} | dict.fromkeys(_FLAGS, False)
        self._settings = {}
        try:
            given = self._read(options, "--{}".format)
            environment = self._read(_environment_arguments(self.environment), variable)
        except usage.UsageError as error:
            raise refusal(f"{error}{suggestion_for(error, self)}") from error
        for options_of, label in ((given, "--{}".format), (environment, variable)):
            clash = sorted(options_of.keys() & _TCP_OPTIONS)
            if clash and "listen" in options_of:
                what = f"{label('listen')} takes the place of {label(clash[0])}"
                raise refusal(f"{what}: give one of them")
        if given.keys() & _TCP_OPTIONS and environment.pop("listen", None):
            del self._settings["listen"]
        self.update(defaults | environment | given)
        self._changed = [
            name for name in defaults if self[name] != defaults[name] and name != "store"
        ]
        for options_of, label in ((given, "--{}".format), (environment, variable)):
            for name, needed in _NEEDED.items():
                if options_of.get(name) and not self[needed]:
                    raise refusal(f"{label(name)} needs {label(needed)}: give both or neither")
        if has_password(given.get("store") or ""):
            _log.warn(
                "action: start | result: warning | error: the process list shows the password of"
                " --store: name the URL in CAFEORCH_STORE, or the password in a file (PGPASSFILE)"
            )
        for name, remedy in unknown_variables(self.environment, (*_PARSERS, *_REPEATED, *_FLAGS)):
            _log.warn(
                "action: start | result: warning | error: {variable} in the environment is not an"
                " option of the server: {remedy}",
                variable=name,
                remedy=remedy,
            )

    def describe_changes(self) -> str:
        """The options that differ from their defaults, without the store and what is secret."""
        arguments = []
        for name in self._changed:
            if name in _FLAGS:
                arguments.append(f"--{name}")
            else:
                values = self[name] if name in _REPEATED else [self._settings[name].value]
                arguments += [
                    f"--{name}={shlex.quote(_without_password(each))}" for each in values
                ]
        return " ".join(arguments) or "-"

    def _read(self, options: list[str] | None, label: Callable[[str], str]) -> dict[str, Any]:
        self.update(dict.fromkeys(_PARSERS))
        self._collected = {}
        super().parseOptions(options)
        texts = {name: " ".join(self._collected.get(name, ())) for name in _REPEATED}
        texts |= {name: self[name] for name in _PARSERS if self[name] is not None}
        given: dict[str, Any] = dict(self._collected)
        for name, parse in _PARSERS.items():
            if name in texts:
                try:
                    given[name] = parse(texts[name])
                except ValueError as error:
                    raise usage.UsageError(f"{label(name)}: {error}") from error
        for name in given:
            option = f"--{name}"
            source = "command line" if label(name) == option else label(name)
            # The command line is read first, and wins.
            self._settings.setdefault(name, Setting(option, texts.get(name, "yes"), source))
        return given


def refusal(message: str) -> SystemExit:
    """Make what ends ``twistd`` with one line and a non-zero status."""
    return SystemExit(f"cafeorch: {message}")


def one_line(error: Exception) -> str:
    """Return what an error says, for a refusal."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _without_password(text: str) -> str:
    return re.sub(r"(://[^:@/\s]*):[^@\s]*@", r"\1:***@", text)


def _environment_arguments(environment: Mapping[str, str]) -> list[str]:
    arguments = []
    for name in _FLAGS:
        text = environment.get(variable(name), "")
        try:
            arguments += [f"--{name}"] if text and _flag(text) else []
        except ValueError as error:
            raise usage.UsageError(f"{variable(name)}: {error}") from error
    for name in (*_PARSERS, *_REPEATED):
        value = environment.get(variable(name), "")
        values = value.split() if name in _REPEATED else filter(None, [value])
        arguments += [f"--{name}={value}" for value in values]
    return arguments
