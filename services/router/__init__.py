"""The router: HTTP in, tokens out. It tokenises, dispatches, follows streams and replays lost ones.

    HTTP  -> api/            validates, renders, counts, formats
          -> session.py      one request from its queue to its last token, replays included
          -> dispatcher.py   which group serves it (decision in dispatch.py, picture in fleet.py)
    bus   -> token_inbox.py  token frames to sessions
          -> observer.py     plan, members and load reports to the fleet
             watchdog.py     silence, gaps, dead workers

It knows no torch and imports no transformers: starting it takes a second.
"""
