complete -c trellisd -l blockdev -d 'Add a node to the block graph (keyval or JSON; `help`, or `DRIVER,help`, lists the options)' -r -f
complete -c trellisd -l chardev -d 'Add a character device for a monitor: a unix socket, one that was inherited (fd=), stdio, or null' -r -f
complete -c trellisd -l export -d 'Export a node (keyval or JSON; `help` lists the options)' -r -f
complete -c trellisd -l monitor -d 'Serve QMP on a character device' -r -f
complete -c trellisd -l nbd-server -d 'Not there yet: it is refused with a sentence' -r -f
complete -c trellisd -l object -d 'Add an object (keyval or JSON; `help`, or `TYPE,help`, lists the options)' -r -f
complete -c trellisd -l qmp -d 'Serve QMP on a unix socket: short for --chardev and --monitor' -r -F
complete -c trellisd -l pidfile -d 'Write the process id to PATH when everything is set up, locked, and removed at the end' -r -F
complete -c trellisd -l log -d 'Where log lines go: auto (the journal under systemd, else stderr), stderr, json, journald, off' -r
complete -c trellisd -s T -l trace -d 'Log more, as `trellisd::control=debug`; may stand several times; `help` lists the targets' -r
complete -c trellisd -l daemonize -d 'Go to the background; the foreground process ends once everything is set up'
complete -c trellisd -s V -l version -d 'Print the version and end'
complete -c trellisd -s h -l help -d 'Print help (see more with \'--help\')'
