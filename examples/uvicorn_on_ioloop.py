"""An ASGI application, served by uvicorn on an ioloop.

python examples/uvicorn_on_ioloop.py --port 8000

uvicorn's own command does it too:

uvicorn --app-dir examples --loop ioloop:new_event_loop uvicorn_on_ioloop:app
"""

import argparse
import asyncio
import json
import socket

import uvicorn


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await live(receive, send)
    elif scope["type"] == "http":
        await respond(send)


async def live(receive, send):
    """Log the stack of whatever keeps all other clients waiting for so long."""
    loop = asyncio.get_running_loop().ioloop
    loop.set_blocking_log_threshold(0.1)
    for _ in ("startup", "shutdown"):
        message = await receive()
        await send({"type": message["type"] + ".complete"})


async def respond(send):
    """Tell what the loop has done so far."""
    loop = asyncio.get_running_loop()
    state = {"asyncio": repr(loop), "ioloop": repr(loop.ioloop), **loop.ioloop.stats()}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(state).encode()})


def main():
    parser = argparse.ArgumentParser(description="HTTP: what the loop has done so far.")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    port = parser.parse_args().port

    config = uvicorn.Config(app, loop="ioloop:new_event_loop", log_level="warning")
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        try:
            uvicorn.Server(config).run([listener])
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
