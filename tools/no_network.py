"""Start-up file of a chapter's kernel: connections to any machine but this one raise `NetworkBlocked`."""


def _block() -> None:
    import ipaddress
    import socket
    from collections.abc import Callable
    from typing import Any

    class NetworkBlocked(RuntimeError):
        """A chapter reached for the network."""

    def is_here(host: Any) -> bool:
        if isinstance(host, bytes):
            host = host.decode()
        if host in (None, "", "localhost", socket.gethostname()):
            return True
        try:
            return ipaddress.ip_address(host.partition("%")[0]).is_loopback
        except ValueError:
            return False

    def check(address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if not is_here(host):
            raise NetworkBlocked(f"no network in this run, and something asked for {host!r}")

    def guarded_method(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: socket.socket, *arguments: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(arguments[-1])
            return original(self, *arguments)

        return method

    def guarded_function(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            check(arguments[0] if arguments else options.get("host", options.get("address")))
            return original(*arguments, **options)

        return function

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guarded_method(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
        setattr(socket, name, guarded_function(getattr(socket, name)))


_block()
del _block
