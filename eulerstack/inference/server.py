"""`eulerstack serve`: the routes as a process, which ends well when it is told to."""

import socket
import time

import uvicorn

from .routes import Api


class Server(uvicorn.Server):
    """Its first signal lets nobody in and waits `drain` seconds for those inside; its second ends at once."""

    def __init__(self, api: Api, drain: float) -> None:
        super().__init__(uvicorn.Config(api.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=5))
        self.api, self.service, self.drain = api, api.service, drain
        self.deadline = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or ():
            host, port = one.getsockname()[:2]
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            print(f"serving {self.api.name} on http://{place} ({self.api.engine.slots} slots)", flush=True)

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.service.closing:
            self.should_exit = self.force_exit = True
        self.service.closing = True
        self.deadline = time.monotonic() + self.drain

    async def on_tick(self, counter: int) -> bool:
        late = time.monotonic() > self.deadline
        if late:
            self.service.abort()
        return await super().on_tick(counter) or late or (self.service.closing and not self.service.inside)


def serve(api: Api, host: str, port: int, drain: float) -> None:
    """Serve until SIGTERM or SIGINT. Raises ValueError where it cannot listen."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error.strerror}; give others") from None
    Server(api, drain).run(sockets=[listener])
