"""Who may use the server: pages of its own origin and those it allows, and clients that know the API key.

access = Access(api_key="secret", allowed_origins="https://chat.example", trusted_proxies="10.0.0.0/8")
headers = access.origin_headers(request, peer)     # HTTPError 403 for a page of another origin
access.check_key(request)                          # HTTPError 401
"""

import hmac
import ipaddress
import urllib.parse
from pathlib import Path

from formats.files import UserError
from serving.http_server import HTTPError, HTTPRequest

DEFAULT_PORTS = {"http": 80, "https": 443}
EXPOSED = "X-Request-Id, Retry-After"  # headers that a page may read
PREFLIGHT_SECONDS = 600  # in which a browser need not ask again


def words(value: str | list | None) -> list[str]:
    """ "a, b" or ["a", "b"] -> the parts that are not empty."""
    parts = value.split(",") if isinstance(value, str) else value or ()
    return [text for part in parts if (text := str(part).strip())]


def model_names(served_model_name: str | list | None, path: str) -> list[str]:
    """What clients may call the model, the first in replies: the last part of its path unless names are given."""
    names = list(dict.fromkeys(words(served_model_name)))
    return names or [Path(path).resolve().name]


def read_origins(value: str | list | None) -> list[str]:
    """allowed_origins -> [scheme://host[:port], …]; UserError for what is none."""
    origins = []
    for word in words(value):
        origin = word.rstrip("/").lower()
        parts = urllib.parse.urlsplit(origin) if origin not in ("*", "null") else None
        if parts is not None and (not parts.scheme or not parts.netloc or parts.path or parts.query or parts.fragment):
            raise UserError(f'allowed_origins: {word!r}; an origin is like https://chat.example:8443, "*" is all')
        origins.append(origin)
    return origins


def read_networks(value: str | list | None) -> list:
    """trusted_proxies -> networks, "*" is all addresses; UserError for what is no address."""
    networks = []
    for word in words(value):
        try:
            networks += map(ipaddress.ip_network, ("0.0.0.0/0", "::/0") if word == "*" else (word,))
        except ValueError:
            message = f'trusted_proxies: {word!r}; an address or a network is expected, such as 10.0.0.0/8; "*" is all'
            raise UserError(message) from None
    return networks


def is_same_origin(origin: str, host: str) -> bool:
    """Whether a page of this origin was loaded under this Host. A Host without a port may have lost it in a proxy, as
    nginx's $host does: then the names decide."""
    try:
        page, own = urllib.parse.urlsplit(origin), urllib.parse.urlsplit(f"//{host}")
        page_port, own_port = page.port or DEFAULT_PORTS.get(page.scheme), own.port
    except ValueError:
        return False
    return page.hostname is not None and page.hostname == own.hostname and own_port in (None, page_port)


class Access:
    """api_key: None is open to all. UserError for values that are none."""

    def __init__(
        self,
        api_key: str | None = None,
        allowed_origins: str | list | None = None,
        trusted_proxies: str | list | None = None,
    ):
        if api_key is not None and not (
            api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""
        ):
            raise UserError(
                "api_key: it must be printable ASCII that is not empty; leave the key out for an open server"
            )
        self.api_key, self.origins = api_key, read_origins(allowed_origins)
        self.proxies = read_networks(trusted_proxies)

    def is_trusted(self, peer: str) -> bool:
        """Whether what a connection from this address says in X-Forwarded-* headers holds."""
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:  # no address, as of a Unix socket
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.proxies)

    def origin_headers(self, request: HTTPRequest, peer: str) -> dict[str, str]:
        """The headers of every reply to this request. HTTPError 403 where a browser asks for another site's page."""
        headers = request.headers
        origin = headers.get("origin", "").lower()
        if not origin:
            return {}
        hosts = [headers.get("host", "")]
        if "x-forwarded-host" in headers and self.is_trusted(peer):
            hosts.append(headers["x-forwarded-host"].partition(",")[0].strip())
        is_own = headers.get("sec-fetch-site") == "same-origin" or any(is_same_origin(origin, host) for host in hosts)
        if not is_own and origin not in self.origins and "*" not in self.origins:
            message = "pages of other origins may not use this server; it takes those of --allowed_origins"
            raise HTTPError(403, f"{message}, and of the Host or X-Forwarded-Host of --trusted_proxies", "wrong_origin")
        return {
            "Access-Control-Allow-Origin": headers["origin"],
            "Access-Control-Expose-Headers": EXPOSED,
            "Vary": "Origin",
        }

    def check_key(self, request: HTTPRequest) -> None:
        """HTTPError 401 without `Authorization: Bearer KEY` or, as Anthropic's clients send it, `X-Api-Key: KEY`."""
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").strip().partition(" ")
        if scheme.lower() != "bearer":
            given = request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode()):
            message = "a valid key is needed: Authorization: Bearer KEY"
            raise HTTPError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def is_preflight(request: HTTPRequest) -> bool:
    """Whether a browser asks what another origin's page may send. It carries no key."""
    return (
        request.method == "OPTIONS"
        and "access-control-request-method" in request.headers
        and ("origin" in request.headers)
    )


def preflight_headers(request: HTTPRequest, methods: tuple[str, ...]) -> dict[str, str]:
    """Of the reply to a preflight, besides origin_headers()."""
    headers = {
        "Access-Control-Allow-Methods": ", ".join((*methods, "OPTIONS")),
        "Access-Control-Allow-Headers": request.headers.get("access-control-request-headers", "*"),
        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
    }
    if request.headers.get("access-control-request-private-network") == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"
    return headers
