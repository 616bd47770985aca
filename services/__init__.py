"""The router, planner and worker services and the `kunserve` command that starts them."""
