#!/bin/sh
# The guest's only program: takes shell commands from the host, one a line, and answers with their output, each line
# behind "| ", and then "= " with the exit status. Says "ready" when it starts.
# Busybox comes last: where the host's own program is here too, it is meant.
export PATH=/usr/sbin:/sbin:/usr/bin:/bin
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox --install -s /bin
for module in /modules/*.ko; do
    insmod "$module"
done

# Its driver may need a moment to find the port.
until port=$(ls /dev/vport*p* 2>/dev/null); do
    usleep 10000
done
exec 3<>"$port"
echo ready >&3
while read -r command <&3; do
    sh -c "$command" >/tmp/output 2>&1 </dev/null
    status=$?
    sed 's/^/| /' /tmp/output >&3
    # Output may end without a line end.
    echo >&3
    echo "= $status" >&3
done
