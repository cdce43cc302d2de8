"""moto's server, one request at a time.

moto looks at the conditions of a write without a lock: of two that come at once both may win, which no store
does that leases and generations can be kept in.
"""

import threading

from moto import server


def one_at_a_time(app):
    lock = threading.Lock()

    def answer(environ, start_response):
        with lock:
            return list(app(environ, start_response))

    return answer


serve = server.run_simple
server.run_simple = lambda host, port, app, **how: serve(host, port, one_at_a_time(app), **how)
server.main()
