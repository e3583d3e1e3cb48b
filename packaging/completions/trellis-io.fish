complete -c trellis-io -l object -d 'make an object that nodes refer to' -r -f
complete -c trellis-io -s c -l cmd -d 'carry out a command, and do not ask for others' -r -f
complete -c trellis-io -s f -l format -d 'the image\'s format, which is guessed otherwise' -r -f
complete -c trellis-io -s i -l aio -d 'threads, native or io_uring: accepted, the runtime chooses' -r -f
complete -c trellis-io -s t -l cache -d 'how the host caches: none, writeback, unsafe, directsync, writethrough' -r -f
complete -c trellis-io -s d -l discard -d 'what becomes of discards: ignore or unmap' -r -f
complete -c trellis-io -l image-opts -d 'FILE is a list of options, as in driver=qcow2,file.filename=a.img'
complete -c trellis-io -s r -l read-only -d 'only read'
complete -c trellis-io -s s -l snapshot -d 'write to an overlay that is thrown away'
complete -c trellis-io -s n -l nocache -d 'past the host\'s cache, as -t none'
complete -c trellis-io -s C -l copy-on-read -d 'copy what is read from below into the image'
complete -c trellis-io -s m -l misalign -d 'buffers that are aligned to nothing'
complete -c trellis-io -s k -l native-aio -d 'as -i native'
complete -c trellis-io -s U -l force-share -d 'whatever other programs do with the image'
complete -c trellis-io -s V -l version -d 'print the version and end'
complete -c trellis-io -s h -l help -d 'Print help (see more with \'--help\')'
