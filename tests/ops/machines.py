"""What machines said of themselves."""

VM_STAT_16K = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              410237.
Pages active:                            471512.
Pages inactive:                          468023.
Pages speculative:                         2417.
Pages throttled:                              0.
Pages wired down:                        143360.
Pages purgeable:                           7016.
"Translation faults":                 431972645.
Pages copy-on-write:                   19041221.
Pages zero filled:                    218834108.
File-backed pages:                       251307.
Anonymous pages:                         690645.
Pages stored in compressor:              262144.
Pages occupied by compressor:             65536.
Swapins:                                      0.
Swapouts:                                     0.
"""
VM_STAT_4K = """\
Mach Virtual Memory Statistics: (page size of 4096 bytes)
Pages free:                             1001472.
Pages active:                           1310720.
Pages inactive:                         1305088.
Pages speculative:                        20480.
Pages wired down:                        524288.
Pages purgeable:                          10240.
"Translation faults":                2147483648.
"""
VM_STAT_STRANDED = VM_STAT_16K.replace(" 143360.", "1179648.").replace(" 410237.", "  10237.")
SYSCTL = {
    "sysctl hw.memsize": "hw.memsize: 25769803776\n",
    "sysctl iogpu.wired_limit_mb": "iogpu.wired_limit_mb: 0\n",
    "fdesetup status": "FileVault is On.\n",
    "sysctl machdep.cpu.brand_string": "machdep.cpu.brand_string: Apple M4 Pro\n",
}
MOUNT_MAC = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
devfs on /dev (devfs, local, nobrowse)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse, protect)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
//ann@nas._smb._tcp.local/share on /Volumes/share (smbfs, nodev, nosuid, mounted by ann)
"""
MEMINFO = """\
MemTotal:       24684088 kB
MemFree:        15316452 kB
MemAvailable:   22643168 kB
Buffers:          326596 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
MOUNTS_LINUX = """\
/dev/vda1 / ext4 rw,relatime 0 0
proc /proc proc rw,relatime 0 0
nas:/home/ann /mnt/my\\040files nfs4 rw,vers=4.2 0 0
"""
LSOF = "p4711\nf7\ncpython3.11\np4712\ncnginx\n"
PROC_NET_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 38123 1
   1: 0100007F:1F40 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 38999 1
   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12001 1
"""
