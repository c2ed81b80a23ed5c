"""Where the metrics of a run go: files in its workdir, always, and the services of `log.sinks`."""
