"""RabbitMQ through pika on an ioloop: messages go to a queue and come back.

An IOLoop has all that pika needs of a loop, so there is nothing to adapt: pass it as
`custom_ioloop`.  Two things to know.  pika neither starts nor stops this loop: to wait
for the end of a connection, stop the loop in `on_close_callback`.  An exception in a
callback goes to `handle_callback_exception`; pika's own loop would end.

python examples/pika_adapter.py --url amqp://guest:guest@localhost/ --messages 5000
"""

import argparse
import time

import pika

import ioloop

# Messages per callback, so that the loop's other handlers get their turn.
BATCH = 100


class RoundTrip:
    """Publishes `count` numbered messages, consumes them, closes, stops the loop."""

    def __init__(self, loop, parameters, count):
        self.loop = loop
        self.count = count
        self.received = []
        self.reason = None
        self.channel = self.queue = None
        self.connection = pika.SelectConnection(
            parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_close,
            on_close_callback=self._on_close,
            custom_ioloop=loop,
        )

    def _on_open(self, connection):
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel):
        self.channel = channel
        channel.queue_declare("", exclusive=True, callback=self._on_queue)

    def _on_queue(self, frame):
        self.queue = frame.method.queue
        self.channel.basic_consume(self.queue, self._on_message)
        self._publish(0)

    def _publish(self, first):
        last = min(first + BATCH, self.count)
        for number in range(first, last):
            self.channel.basic_publish("", self.queue, b"%d" % number)
        if last < self.count:
            self.loop.add_callback(self._publish, last)

    def _on_message(self, channel, method, properties, body):
        channel.basic_ack(method.delivery_tag)
        self.received.append(int(body))
        if len(self.received) == self.count:
            self.connection.close()

    def _on_close(self, connection, reason):
        self.reason = reason
        self.loop.stop()


def main():
    parser = argparse.ArgumentParser(description="Messages to RabbitMQ and back.")
    parser.add_argument("--url", default="amqp://guest:guest@localhost/")
    parser.add_argument("--messages", type=int, default=5000)
    arguments = parser.parse_args()

    with ioloop.IOLoop() as loop:
        parameters = pika.URLParameters(arguments.url)
        trip = RoundTrip(loop, parameters, arguments.messages)
        start = time.perf_counter()
        loop.start()
        seconds = time.perf_counter() - start
    if trip.received != list(range(arguments.messages)):
        raise SystemExit(f"not all messages came back: {trip.reason!r}")
    print(f"{arguments.messages} messages there and back in {seconds:.2f} s")


if __name__ == "__main__":
    main()
