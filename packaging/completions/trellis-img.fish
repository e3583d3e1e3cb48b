# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_trellis_img_global_optspecs
    string join \n h/help V/version
end

function __fish_trellis_img_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_trellis_img_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_trellis_img_using_subcommand
    set -l cmd (__fish_trellis_img_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c trellis-img -n "__fish_trellis_img_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -s V -l version -d 'Print version'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "amend" -d 'Changes options of an image\'s format'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "bench" -d 'Measures how long requests take'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "bitmap" -d 'Changes the dirty bitmaps that an image stores'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "check" -d 'Checks an image, and repairs it'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "commit" -d 'Copies what an image has into what it stands on'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "compare" -d 'Compares the contents of two images'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "convert" -d 'Copies images into another one'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "create" -d 'Makes an image'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "dd" -d 'Copies a part of an image into a new one'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "info" -d 'Says what an image is'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "map" -d 'Shows where the bytes of an image are'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "measure" -d 'Says how large the file of a new image would be'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "rebase" -d 'Lets an image stand on another one'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "resize" -d 'Gives an image another size'
complete -c trellis-img -n "__fish_trellis_img_needs_command" -f -a "snapshot" -d 'Lists, takes, applies and deletes internal snapshots of an image'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -s o -l options -d 'what is to change, as a=b,c=d (`help` lists the options)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -s t -l cache -d 'how the host caches the image (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -l force -d 'also what makes data unreadable for good: erasing all key slots, or one that is in use'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -s p -l progress -d 'show how far the work has come'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand amend" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s c -l count -d 'requests (default: 75000)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s d -l depth -d 'requests under way at once (default: 64)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s s -l buffer-size -d 'bytes of a request (default: 4k)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s S -l step-size -d 'from the beginning of a request to that of the next (default: the same)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s o -l offset -d 'where the first one begins' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -l pattern -d 'what is written (default: 0)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -l flush-interval -d 'flush after so many writes' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s i -l aio -d 'threads, native or io_uring: accepted, the runtime chooses' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s t -l cache -d 'how the host caches the image (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s w -l write -d 'write instead of reading'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -l no-drain -d 'without waiting for those under way'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s n -l native -d 'as -i native'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bench" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -s g -l granularity -d 'bytes for a bit of the bitmap that is added' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l merge -d 'mark in BITMAP what is marked in the bitmap SOURCE' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -s b -l source-file -d 'the image that SOURCE is in, if it is another one' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -s F -l source-format -d 'the format of that' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l add -d 'make BITMAP; it records from then on'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l remove -d 'remove BITMAP'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l clear -d 'take all marks out of BITMAP'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l enable -d 'let BITMAP record'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -l disable -d 'let BITMAP stay as it is'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand bitmap" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -s T -l cache -d 'how the host caches the image (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -l output -d 'for people or for programs (default: human)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -s r -l repair -d 'give lost space back, or put right whatever can be' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand check" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s t -l cache -d 'how the host caches the image (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s b -l base -d 'the layer that gets it all, instead of the next one; the image is not emptied' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s r -l rate -d 'bytes a second at the most' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s p -l progress -d 'show how far the work has come'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s d -l drop -d 'the image is not emptied afterwards'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand commit" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s f -l a-format -d 'the first image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s F -l b-format -d 'the second image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s T -l cache -d 'how the host caches the image (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s p -l progress -d 'show how far the work has come'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s s -l strict -d 'sizes, and what is allocated, have to be the same too'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand compare" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s O -l target-format -d 'the format of the new image (default: raw)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s o -l options -d 'options of the new image, as a=b,c=d (`help` lists them)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s B -l backing -d 'the new image stands on this one, which has what is not copied' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s F -l backing-format -d 'the format of that' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s l -l snapshot -d 'copy an internal snapshot: its name or id, or snapshot.id=…,snapshot.name=…' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s m -l parallel -d 'parts that are copied at once, 1 to 16 (default: 8)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s r -l rate-limit -d 'bytes written in a second at the most' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s S -l sparse-size -d 'zeroes of at least so many bytes are left out (default: 4k; 0: none)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s t -l target-cache -d 'how the host caches the target (default: unsafe)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s T -l source-cache -d 'how the host caches the source (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s c -l compress -d 'store the data compressed'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s C -l copy-range-offloading -d 'let the kernel copy, where it can'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s n -l skip-create -d 'the target is there already'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s W -l oob-writes -d 'write in any order'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -l target-image-opts -d 'the target is named by a list of options, not by a file'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -l target-is-zero -d 'the target reads as zeroes already'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -l bitmaps -d 'copy persistent dirty bitmaps too'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -l skip-broken-bitmaps -d 'but not those that cannot be used'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -l salvage -d 'what cannot be read is zeroes in the target'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s p -l progress -d 'show how far the work has come'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand convert" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -s f -l format -d 'the format of the new image (default: raw)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -s o -l options -d 'options of the format, as a=b,c=d (`help` lists them)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -s b -l backing -d 'the new image stands on this one' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -s F -l backing-format -d 'the format of that' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -s u -l backing-unsafe -d 'that one is not looked at'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand create" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand dd" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand dd" -s O -l target-format -d 'the format of the new image (default: raw)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand dd" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand dd" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand dd" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand dd" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand info" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand info" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand info" -l output -d 'for people or for programs (default: human)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand info" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand info" -s b -l backing-chain -d 'also of what the image stands on, down to the bottom'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand info" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand info" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -l output -d 'for people or for programs (default: human)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -s s -l start-offset -d 'the first byte that is looked at (default: 0)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -s l -l max-length -d 'how many bytes are looked at (default: all)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand map" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -s O -l target-format -d 'the format of the new image (default: raw)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -s o -l options -d 'options of the format, as a=b,c=d' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -s s -l size -d 'for a disk of this size, with nothing in it' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -s l -l snapshot -d 'for this snapshot of the image' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -l output -d 'for people or for programs (default: human)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand measure" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s t -l cache -d 'how the host caches the image (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s b -l backing -d 'what the image shall stand on; empty: nothing' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s F -l backing-format -d 'the format of that' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s T -l backing-cache -d 'how the host caches that (default: writeback)' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s p -l progress -d 'show how far the work has come'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s u -l backing-unsafe -d 'only the name changes: nothing is compared or copied'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s c -l compress -d 'what is copied is compressed'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand rebase" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand resize" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand resize" -l preallocation -d 'how room is made: off, metadata, falloc, full' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand resize" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand resize" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand resize" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand resize" -l shrink -d 'what lies behind the new end may be lost'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand resize" -s h -l help -d 'Print help'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s f -l format -d 'the image\'s format; it is guessed otherwise' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -l object -d 'make an object that images may refer to' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s c -l create -d 'take a snapshot of this name' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s a -l apply -d 'make the disk what it was; what it is now is lost' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s d -l delete -d 'delete a snapshot' -r -f
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s q -l quiet -d 'print errors only'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -l image-opts -d 'images are named by lists of options, not by files'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s U -l force-share -d 'open the image even if somebody writes to it'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s l -l list -d 'list all snapshots (the default)'
complete -c trellis-img -n "__fish_trellis_img_using_subcommand snapshot" -s h -l help -d 'Print help'
