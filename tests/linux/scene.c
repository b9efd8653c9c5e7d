// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Process 1 of a Linux guest whose memory is read from outside: makes a known scene, writes what /proc shows of it (the
 * truth) to the first virtio disk, and keeps still.
 *
 * The truth is a sequence of sections, each "@PATH LENGTH\n", the bytes and "\n"; for a symbolic link, "->PATH". It ends
 * with the section "end". "SCENE READY" on the console says that it is on the disk.
 *
 * Words in the environment variable "scene" (of the kernel's command line) change the scene: "wrap" overflows the
 * kernel's log, "symbols" adds /proc/kallsyms and the kernel's BTF to the truth, "crowd" starts CROWD more processes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* linux/prctl.h, from 5.17 on. */
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

static void must(int fine, const char *what)
{
	if (fine)
		return;
	fprintf(stderr, "SCENE FAILED: %s: %s\n", what, strerror(errno));
	for (;;)
		pause();
}

static int wants(const char *word)
{
	const char *words = getenv("scene");

	return words && strstr(words, word);
}

/* ---- the truth ---- */

static FILE *truth;

static void put(const char *mark, const char *path, const char *bytes, size_t length)
{
	fprintf(truth, "@%s%s %zu\n", mark, path, length);
	must(fwrite(bytes, 1, length, truth) == length, "the truth");
	fputc('\n', truth);
}

/* Copies a file of /proc or /sys; one that is not there, or that a process has not got, is left out. */
static void copy(const char *path)
{
	static char *bytes;
	static size_t room;
	size_t length = 0;
	ssize_t got = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	do {
		length += got;
		if (room - length < 65536) {
			room = room * 2 + (1 << 20);
			bytes = realloc(bytes, room);
			must(bytes != NULL, "memory");
		}
		/* /proc/sys allocates as much as is asked for. */
		got = read(fd, bytes + length, 65536);
	} while (got > 0);
	close(fd);
	if (got == 0)
		put("", path, bytes, length);
}

/* The line of /proc/kallsyms with the address of a symbol. */
static void symbol(const char *name)
{
	FILE *symbols = fopen("/proc/kallsyms", "re");
	char line[600], *end;

	must(symbols != NULL, "/proc/kallsyms");
	while (fgets(line, sizeof(line), symbols)) {
		end = strpbrk(line, "\t\n");
		if (end)
			*end = 0;
		end = strrchr(line, ' ');
		if (end && !strcmp(end + 1, name)) {
			put("", name, line, strlen(line));
			break;
		}
	}
	fclose(symbols);
}

static void link_of(const char *path)
{
	char target[4096];
	ssize_t length = readlink(path, target, sizeof(target));

	if (length >= 0)
		put("->", path, target, length);
}

static char *join(const char *folder, const char *name)
{
	char *path;

	must(asprintf(&path, "%s/%s", folder, name) > 0, "memory");
	return path;
}

/* Calls `each` with every entry of a folder. */
static void entries(const char *folder, void (*each)(const char *path, const char *name))
{
	struct dirent *entry;
	DIR *open_folder = opendir(folder);
	char *path;

	if (!open_folder)
		return;
	while ((entry = readdir(open_folder))) {
		if (entry->d_name[0] == '.')
			continue;
		path = join(folder, entry->d_name);
		each(path, entry->d_name);
		free(path);
	}
	closedir(open_folder);
}

static void link_entry(const char *path, const char *name)
{
	(void)name;
	link_of(path);
}

static void inside(const char *folder, const char *name, void (*take)(const char *path))
{
	char *path = join(folder, name);

	take(path);
	free(path);
}

static void task(const char *folder, const char *name)
{
	(void)name;
	inside(folder, "stat", copy);
	inside(folder, "status", copy);
	inside(folder, "comm", copy);
}

static void all_inside(const char *folder, const char *name, void (*each)(const char *path, const char *name))
{
	char *path = join(folder, name);

	entries(path, each);
	free(path);
}

/* Copies what the network namespace of a process shows, if that is not the first one. */
static void net(const char *folder)
{
	static const char *const files[] = { "net/tcp", "net/tcp6", "net/udp", "net/udp6", "net/raw", "net/raw6", "net/unix" };
	char own[64] = "", first[64] = "";
	char *path = join(folder, "ns/net");
	size_t i;

	if (readlink(path, own, sizeof(own) - 1) > 0 && readlink("/proc/1/ns/net", first, sizeof(first) - 1) > 0 &&
	    strcmp(own, first))
		for (i = 0; i < sizeof(files) / sizeof(*files); i++)
			inside(folder, files[i], copy);
	free(path);
}

static void process(const char *folder, const char *name)
{
	if (name[0] < '0' || name[0] > '9')
		return;
	net(folder);
	task(folder, name);
	inside(folder, "cmdline", copy);
	inside(folder, "environ", copy);
	inside(folder, "maps", copy);
	inside(folder, "mountinfo", copy);
	inside(folder, "exe", link_of);
	inside(folder, "cwd", link_of);
	inside(folder, "root", link_of);
	all_inside(folder, "fd", link_entry);
	all_inside(folder, "ns", link_entry);
	all_inside(folder, "task", task);
}

/* Every record of the kernel's log, as /dev/kmsg gives it. */
static void kernel_log(void)
{
	size_t length = 0, room = 4 << 20;
	char *bytes = malloc(room);
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	ssize_t got;

	must(bytes && fd >= 0, "/dev/kmsg");
	for (;;) {
		got = read(fd, bytes + length, 8192);
		if (got < 0 && errno == EPIPE)
			continue; /* Overwritten while it was read. */
		if (got <= 0)
			break;
		length += got;
		must(length + 8192 < room, "room for the log");
	}
	put("", "/dev/kmsg", bytes, length);
	free(bytes);
	close(fd);
}

static void write_truth(void)
{
	static const char *const files[] = {
		"/proc/uptime", "/proc/version", "/proc/cmdline", "/proc/stat", "/proc/modules", "/proc/iomem",
		"/proc/sys/kernel/osrelease", "/proc/sys/kernel/version", "/proc/sys/kernel/hostname",
		"/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6", "/proc/net/unix",
		"/proc/net/raw", "/proc/net/raw6", "/proc/net/netlink", "/proc/net/packet", "/sys/kernel/notes", "/sys/kernel/vmcoreinfo",
	};
	int fd = open("/dev/vda", O_WRONLY | O_CLOEXEC);
	size_t i;

	truth = fd < 0 ? NULL : fdopen(fd, "w");
	must(truth != NULL, "/dev/vda");
	if (wants("symbols")) {
		copy("/proc/kallsyms");
		copy("/sys/kernel/btf/vmlinux");
	}
	symbol("_text");
	for (i = 0; i < sizeof(files) / sizeof(*files); i++)
		copy(files[i]);
	kernel_log();
	entries("/proc", process);
	put("", "end", "", 0);
	must(fflush(truth) == 0 && fsync(fd) == 0, "the disk");
	/* Stays open: closing the device would drop its pages by a kworker. */
}

/* ---- the scene ---- */

/* A pipe that each actor writes a byte to when it is in its place. */
static int ready[2];

static void in_place(void)
{
	must(write(ready[1], "", 1) == 1, "the pipe");
}

static void rest(void)
{
	for (;;)
		pause();
}

/* Starts an actor: this program again, by another name and with arguments. */
static void act(const char *name, char *const arguments[])
{
	struct pollfd place = { .fd = ready[0], .events = POLLIN };
	char byte;
	int status;
	pid_t child = fork();

	must(child >= 0, "fork");
	if (child == 0) {
		execv("/bin/scene", arguments);
		must(0, name);
	}
	while (poll(&place, 1, 100) == 0) {
		if (waitpid(child, &status, WNOHANG) == child) {
			fprintf(stderr, "SCENE FAILED: %s has ended with status %#x\n", name, status);
			rest();
		}
	}
	must(read(ready[0], &byte, 1) == 1, name);
}

static void *thread(void *name)
{
	prctl(PR_SET_NAME, name);
	in_place();
	rest();
	return NULL;
}

static void threads(void)
{
	static const char *const names[] = { "worker-0", "worker-1", "worker two" };
	pthread_attr_t small;
	pthread_t id;
	char byte;
	int i;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	for (i = 0; i < 3; i++) {
		must(pthread_create(&id, &small, thread, (void *)names[i]) == 0, "thread");
		must(read(ready[0], &byte, 1) == 1, "thread");
	}
}

static void files(void)
{
	int pipe_fds[2], fd;
	void *mapped;

	fd = open("/mnt/inner/mapped file", O_RDWR | O_CREAT, 0600);
	must(fd >= 0 && ftruncate(fd, 8192) == 0, "mapped file");
	mapped = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(mapped != MAP_FAILED, "map");
	must(mmap(NULL, 3 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED, "map none");
	fd = open("/tmp/deleted", O_RDWR | O_CREAT, 0600);
	must(fd >= 0 && unlink("/tmp/deleted") == 0, "deleted file");
	must(open("/mnt/file", O_WRONLY | O_CREAT | O_APPEND, 0644) >= 0, "file");
	must(open("/tmp/new\nline", O_WRONLY | O_CREAT, 0644) >= 0, "file with a line break");
	must(open("/tmp/folder", O_RDONLY | O_DIRECTORY) >= 0, "folder");
	must(pipe(pipe_fds) == 0 && eventfd(0, 0) >= 0, "pipe");
	must(dup2(pipe_fds[0], 200) == 200, "a high number");
	must(chdir("/mnt/inner") == 0, "chdir");
}

/*
 * Places of actor "memory", which xtask/src/linux/memory.rs reads. The kernel puts the heap anywhere in
 * the first GiB after the program, and what it places by itself near the stack.
 */
#define MANY ((char *)0x100000000000)
#define TEXT ((char *)0x200000000000)
#define HIDDEN ((char *)0x300000000000)
#define PAGES 1200

/* A page of a file that is not there, at a place of the kernel's choice. */
static void map_file(int fd, int prot, int flags)
{
	must(fd >= 0 && ftruncate(fd, 4096) == 0, "file to map");
	must(mmap(NULL, 4096, prot, flags, fd, 0) != MAP_FAILED, "map file");
	close(fd);
}

static char *map_at(char *place, size_t length, int prot)
{
	char *mapped = mmap(place, length, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	must(mapped == place, "map at a place");
	return mapped;
}

static void memory(void)
{
	static const char text[] = "scene: text over two pages", hidden[] = "scene: no access";
	char *large;
	int i, id;

	/* Every second page differs, so that none are joined. */
	map_at(MANY, PAGES * 4096, PROT_READ);
	for (i = 0; i < PAGES; i += 2)
		must(mprotect(MANY + i * 4096, 4096, PROT_READ | PROT_WRITE) == 0, "mprotect");
	/* The second page first, so that its frame is not the one after that of the first. The third has none. */
	map_at(TEXT, 3 * 4096, PROT_READ | PROT_WRITE);
	TEXT[4096] = 0;
	TEXT[0] = 0;
	memcpy(TEXT + 4096 - 10, text, sizeof(text));
	map_at(HIDDEN, 4096, PROT_READ | PROT_WRITE);
	memcpy(HIDDEN, hidden, sizeof(hidden));
	must(mprotect(HIDDEN, 4096, PROT_NONE) == 0, "mprotect");
	/* A name of the program's own; most of Debian's kernels have none. */
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, HIDDEN, 4096, "scene's own");
	large = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(large != MAP_FAILED, "map");
	madvise(large, 8 << 20, MADV_HUGEPAGE);
	memset(large, 1, 8 << 20);
	map_file(open("/tmp/mapped and deleted", O_RDWR | O_CREAT | O_EXCL, 0600), PROT_READ, MAP_PRIVATE);
	must(unlink("/tmp/mapped and deleted") == 0, "unlink");
	map_file(open("/tmp/mapped\nlines", O_RDWR | O_CREAT, 0600), PROT_READ | PROT_EXEC, MAP_SHARED);
	map_file(open("/mnt/overlay/new", O_RDWR | O_CREAT, 0600), PROT_READ | PROT_WRITE, MAP_SHARED);
	map_file(memfd_create("scene", 0), PROT_READ | PROT_WRITE, MAP_SHARED);
	id = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600);
	must(id >= 0 && shmat(id, NULL, 0) != (void *)-1, "shmat");
	must(mmap(NULL, 4096, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED, "map shared");
}

/* Runs this program from a file that the next actor removes. */
static void run_copy(void)
{
	char bytes[65536];
	int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), to = open("/tmp/program", O_WRONLY | O_CREAT | O_EXCL, 0700);
	ssize_t got;

	must(from >= 0 && to >= 0, "copy");
	while ((got = read(from, bytes, sizeof(bytes))) > 0)
		must(write(to, bytes, got) == got, "copy");
	close(to);
	execve("/tmp/program", (char *[]){ "copy", "removed", NULL }, (char *[]){ "SCENE=\n\303\274", "", "EMPTY=", NULL });
	must(0, "execve");
}

static void sockets(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(4321),
				       .sin_addr = { htonl(INADDR_LOOPBACK) } };
	struct sockaddr_in6 address6 = { .sin6_family = AF_INET6, .sin6_port = htons(4322), .sin6_addr = in6addr_loopback };
	struct sockaddr_un path = { .sun_family = AF_UNIX, .sun_path = "/tmp/socket" };
	struct sockaddr_un abstract = { .sun_family = AF_UNIX, .sun_path = "\0ab\0stract" };
	struct sockaddr_un evil = { .sun_family = AF_UNIX, .sun_path = "/tmp/\33[31m\n" };
	int listener, client, fds[2];

	listener = socket(AF_INET, SOCK_STREAM, 0);
	must(bind(listener, (void *)&address, sizeof(address)) == 0 && listen(listener, 5) == 0, "listen");
	client = socket(AF_INET, SOCK_STREAM, 0);
	must(connect(client, (void *)&address, sizeof(address)) == 0, "connect");
	must(accept(listener, NULL, NULL) >= 0, "accept");
	/* One that is not accepted. */
	client = socket(AF_INET, SOCK_STREAM, 0);
	must(connect(client, (void *)&address, sizeof(address)) == 0, "connect");
	listener = socket(AF_INET6, SOCK_STREAM, 0);
	must(bind(listener, (void *)&address6, sizeof(address6)) == 0 && listen(listener, 5) == 0, "listen6");
	client = socket(AF_INET6, SOCK_STREAM, 0);
	must(connect(client, (void *)&address6, sizeof(address6)) == 0, "connect6");
	must(accept(listener, NULL, NULL) >= 0, "accept6");
	address.sin_port = htons(5353);
	must(bind(socket(AF_INET, SOCK_DGRAM, 0), (void *)&address, sizeof(address)) == 0, "udp");
	address6.sin6_port = htons(5354);
	must(bind(socket(AF_INET6, SOCK_DGRAM, 0), (void *)&address6, sizeof(address6)) == 0, "udp6");
	listener = socket(AF_UNIX, SOCK_STREAM, 0);
	must(bind(listener, (void *)&path, sizeof(path)) == 0 && listen(listener, 5) == 0, "unix");
	client = socket(AF_UNIX, SOCK_STREAM, 0);
	must(connect(client, (void *)&path, sizeof(path)) == 0, "unix connect");
	must(bind(socket(AF_UNIX, SOCK_DGRAM, 0), (void *)&abstract, sizeof(sa_family_t) + 10) == 0, "abstract");
	must(bind(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&evil, sizeof(evil)) == 0, "unix with a line break");
	must(socket(AF_INET, SOCK_RAW, 253) >= 0 && socket(AF_INET6, SOCK_RAW, 254) >= 0, "raw");
	address.sin_port = htons(4321);
	must(connect(socket(AF_INET, SOCK_DGRAM, 0), (void *)&address, sizeof(address)) == 0, "connected udp");
	must(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds) == 0, "socketpair");
}

/* Sockets of a network namespace without an interface that is up, so that they are bound to all addresses. */
static void sockets_inside(void)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(4321) };
	struct sockaddr_un abstract = { .sun_family = AF_UNIX, .sun_path = "\0inside" };
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	must(bind(listener, (void *)&any, sizeof(any)) == 0 && listen(listener, 5) == 0, "listen inside");
	must(bind(socket(AF_INET, SOCK_DGRAM, 0), (void *)&any, sizeof(any)) == 0, "udp inside");
	must(bind(socket(AF_UNIX, SOCK_DGRAM, 0), (void *)&abstract, sizeof(sa_family_t) + 7) == 0, "abstract inside");
}

/* Plays the actor `name`; does not return. */
static void play(const char *name)
{
	prctl(PR_SET_NAME, name);
	if (!strcmp(name, "threads")) {
		threads();
	} else if (!strcmp(name, "files")) {
		files();
	} else if (!strcmp(name, "sockets")) {
		sockets();
	} else if (!strcmp(name, "memory")) {
		memory();
	} else if (!strcmp(name, "copy")) {
		run_copy();
	} else if (!strcmp(name, "removed")) {
		must(unlink("/tmp/program") == 0, "unlink");
	} else if (!strcmp(name, "user")) {
		must(setresgid(1000, 1001, 1002) == 0 && setresuid(1000, 1001, 1002) == 0, "setresuid");
		must(socket(AF_UNIX, SOCK_DGRAM, 0) >= 0 && socket(AF_INET, SOCK_DGRAM, 0) >= 0, "sockets of a user");
		struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(5355) };
		must(bind(socket(AF_INET, SOCK_DGRAM, 0), (void *)&any, sizeof(any)) == 0, "udp of a user");
	} else if (!strcmp(name, "zombies")) {
		pid_t child = fork();

		if (child == 0) {
			prctl(PR_SET_NAME, "zombie");
			_exit(3);
		}
		/* It is one as soon as it can be waited for. */
		must(waitid(P_PID, child, &(siginfo_t){ 0 }, WEXITED | WNOWAIT) == 0, "waitid");
	} else if (!strcmp(name, "parent")) {
		in_place();
		/* Its state is D until the child has ended. */
		if (vfork() == 0)
			rest();
	} else if (!strcmp(name, "contained")) {
		must(unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWPID | CLONE_NEWNET) == 0, "unshare");
		must(mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "private mounts");
		must(mount("inside", "/tmp/folder", "tmpfs", 0, NULL) == 0, "mount inside");
		must(sethostname("inside", 6) == 0, "sethostname");
		sockets_inside();
		if (fork() == 0) {
			prctl(PR_SET_NAME, "contained child");
			must(chroot("/tmp/folder") == 0 && chdir("/") == 0, "chroot");
			in_place();
			rest();
		}
		rest();
	} else if (!strcmp(name, "stopped")) {
		in_place();
		raise(SIGSTOP);
	} else if (!strcmp(name, "evil")) {
		prctl(PR_SET_NAME, "e\33[31mv\n) R 1");
	}
	in_place();
	rest();
}

static void modules(void)
{
	char line[200];
	FILE *order = fopen("/modules/order", "re");

	must(order != NULL, "/modules/order");
	while (fgets(line, sizeof(line), order)) {
		char path[300];
		int fd;

		line[strcspn(line, "\n")] = 0;
		snprintf(path, sizeof(path), "/modules/%s", line);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		must(fd >= 0 && (syscall(SYS_finit_module, fd, "", 0) == 0 || errno == EEXIST), path);
		close(fd);
	}
	fclose(order);
}

static void system_up(void)
{
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/tmp", 01777);
	mkdir("/mnt", 0755);
	must(mount("proc", "/proc", "proc", 0, NULL) == 0, "/proc");
	must(mount("sysfs", "/sys", "sysfs", 0, NULL) == 0, "/sys");
	mkdir("/dev", 0755);
	must(mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) == 0, "/dev");
	must(mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID, "size=4m") == 0, "/tmp");
	must(mount("outer", "/mnt", "tmpfs", 0, NULL) == 0, "/mnt");
	mkdir("/mnt/inner", 0755);
	mkdir("/tmp/folder", 0755);
	mkdir("/tmp/upper", 0755);
	mkdir("/tmp/work", 0755);
	mkdir("/mnt/overlay", 0755);
	must(mount("in ner", "/mnt/inner", "tmpfs", MS_NODEV | MS_NOATIME, NULL) == 0, "/mnt/inner");
	fd = open("/proc/sys/kernel/kptr_restrict", O_WRONLY | O_CLOEXEC);
	must(fd >= 0 && write(fd, "0", 1) == 1, "kptr_restrict");
	close(fd);
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	must(ioctl(fd, SIOCSIFFLAGS, &lo) == 0, "lo");
	close(fd);
	must(sethostname("scene-1", 7) == 0, "sethostname");
}

/* Writes a record to the kernel's log. */
static void say(const char *record)
{
	int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	ssize_t length = strlen(record);

	must(fd >= 0 && write(fd, record, length) == length, "/dev/kmsg");
	close(fd);
}

/* Writes more than the kernel's log holds. */
static void wrap_log(void)
{
	int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC), i;
	char line[300];

	must(fd >= 0, "/dev/kmsg");
	for (i = 0; i < 6000; i++) {
		int length = snprintf(line, sizeof(line), "<6>scene: line %d %.*s", i, i % 200,
				      "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"
				      "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"
				      "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz");
		must(write(fd, line, length) == length, "a line of the log");
	}
	close(fd);
}

#define CROWD 150

/* Starts many processes, as a machine at work has. */
static void crowd(void)
{
	char name[32];
	int i;

	for (i = 0; i < CROWD; i++) {
		snprintf(name, sizeof(name), "member-%d", i);
		act(name, (char *[]){ "/usr/sbin/member", name, NULL });
	}
}

/* Waits until an actor that cannot say so itself has the state that it is to have. */
static void wait_for_states(void)
{
	int stopped, blocked;

	do {
		char path[64], line[256];
		int pid;

		stopped = blocked = 0;
		for (pid = 2; pid < 4096; pid++) {
			FILE *stat;
			char *end;

			snprintf(path, sizeof(path), "/proc/%d/stat", pid);
			stat = fopen(path, "re");
			if (!stat)
				continue;
			if (fgets(line, sizeof(line), stat) && (end = strrchr(line, ')'))) {
				stopped |= strstr(line, "(stopped)") && end[2] == 'T';
				blocked |= strstr(line, "(parent)") && end[2] == 'D';
			}
			fclose(stat);
		}
	} while (!stopped || !blocked);
}

int main(int count, char *arguments[])
{
	static char padding[6001];
	int fd;

	if (getpid() != 1) {
		ready[0] = 100;
		ready[1] = 101;
		play(count > 1 ? arguments[1] : "");
	}
	system_up();
	fd = open("/dev/console", O_RDWR | O_CLOEXEC);
	must(fd >= 0 && dup2(fd, 0) == 0 && dup2(fd, 1) == 1 && dup2(fd, 2) == 2, "/dev/console");
	modules();
	/* Its module was loaded, or is built in. */
	must(mount("overlay", "/mnt/overlay", "overlay", 0, "lowerdir=/bin,upperdir=/tmp/upper,workdir=/tmp/work") == 0, "overlay");
	say("<5>scene: a\ttab, \33[1mescape and \303\274");
	say("<3>scene: two\nlines");
	if (wants("wrap"))
		wrap_log();
	must(pipe(ready) == 0 && dup2(ready[0], 100) == 100 && dup2(ready[1], 101) == 101, "pipe");
	close(ready[0]);
	close(ready[1]);
	ready[0] = 100;
	ready[1] = 101;
	memset(padding, 'x', sizeof(padding) - 1);
	act("threads", (char *[]){ "/usr/sbin/daemon", "threads", NULL });
	act("files", (char *[]){ "files", "files", "--an argument", "", "last", NULL });
	act("sockets", (char *[]){ "sockets", "sockets", NULL });
	act("memory", (char *[]){ "memory", "memory", NULL });
	act("copy", (char *[]){ "copy", "copy", NULL });
	act("user", (char *[]){ "user", "user", "\303\274\33[2J", NULL });
	act("zombies", (char *[]){ "zombies", "zombies", NULL });
	act("parent", (char *[]){ "parent", "parent", NULL });
	act("contained", (char *[]){ "contained", "contained", NULL });
	act("stopped", (char *[]){ "stopped", "stopped", NULL });
	act("evil", (char *[]){ "evil", "evil", padding, "behind", NULL });
	if (wants("crowd"))
		crowd();
	wait_for_states();
	write_truth();
	printf("SCENE READY\n");
	rest();
}
