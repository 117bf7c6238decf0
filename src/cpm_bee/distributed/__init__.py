"""The processes of a run: rank, process group, heartbeat, rendezvous."""
