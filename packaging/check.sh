#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
# Installs, uses, upgrades and purges the packages in the clean Debian root it runs in, as root. The packages are in
# $1/one and, with a higher revision, in $1/two. Prints a line for each check: "ok NAME", "not ok NAME: WHY" or
# "skip NAME: WHY".
set -u
here=$1
log=$here/log
socket=/run/kvmmem/kvmmemd.sock
config=/etc/kvmmem/kvmmemd.toml
names='kvmmem kvmmemd kvmmem-dkms libkvmmem-dev'

# check NAME COMMAND...: what it prints is shown where it fails.
check() {
	name=$1
	shift
	# Not as the condition itself: there, the shell would go on behind a command that fails.
	(set -e; "$@") >"$log" 2>&1
	code=$?
	if [ "$code" = 0 ]; then
		echo "ok $name"
	else
		echo "not ok $name: $(tail -n 6 "$log" | tr '\n' '|')"
	fi
	return "$code"
}

# Whether a command fails. "!" alone would not end a check.
fails() {
	if "$@"; then return 1; fi
}

install() {
	apt-get -q -y --no-install-recommends install "$@"
}

# Names of all files but those of dpkg, apt, this check, and what the tools of systemd note for themselves.
list() {
	find / -xdev \( -path /proc -o -path /dev -o -path /tmp -o -path "$here" -o -path /var/lib/dpkg \
		-o -path /var/lib/apt -o -path /var/cache -o -path /run/systemd \) -prune -o -print | sort
}

# What the four need is installed first: all that then comes is theirs.
needs() {
	needed=$(apt-get -q -s --no-install-recommends install "$here"/one/*.deb | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
	for name in $names; do
		needed=$(echo "$needed" | grep -vx "$name")
	done
	# shellcheck disable=SC2086 # a list
	install $needed logrotate
}

# Debian's headers of a kernel that the module does not fit, as far as the check reads them.
fake_kernels() {
	for kernel in 6.12.0-plain 7.3.0-bare; do
		mkdir -p "/lib/modules/$kernel/build/include/config"
		touch "/lib/modules/$kernel/build/Makefile"
	done
	echo CONFIG_MODULES=y >/lib/modules/6.12.0-plain/build/include/config/auto.conf
	echo CONFIG_RUST=y >/lib/modules/7.3.0-bare/build/include/config/auto.conf
	for kernel in 6.12.0-plain 7.3.0-bare; do
		cp "/lib/modules/$kernel/build/include/config/auto.conf" "/lib/modules/$kernel/build/.config"
	done
}

install_one() {
	install "$here"/one/*.deb >"$here/installed" 2>&1 || { tail -n 20 "$here/installed"; return 1; }
	grep '0 upgraded, 4 newly installed' "$here/installed"
}

versions() {
	kvmmem --version | grep '^kvmmem [0-9]'
	kvmmemd --version | grep '^kvmmemd [0-9]'
	test "$(dpkg-query -W -f '${Version}' kvmmem)" = "$(kvmmem --version | sed 's/.* //')-1"
}

pages() {
	man kvmmem | grep 'kvmmem-grant(1)'
	man kvmmem-grant-create | grep -e --rw
	man 8 kvmmemd | grep -e --audit
	for page in /usr/share/man/man1/kvmmem*.gz /usr/share/man/man8/kvmmemd.8.gz; do
		warnings=$(man --warnings -l "$page" 2>&1 >/dev/null)
		test -z "$warnings" || { echo "$page: $warnings"; return 1; }
	done
}

completions() {
	bash -c '
		set -e
		. /usr/share/bash-completion/bash_completion
		_comp_load kvmmem
		complete -p kvmmem
		COMP_WORDS=(kvmmem gr) COMP_CWORD=1
		_kvmmem kvmmem gr kvmmem
		[[ " ${COMPREPLY[*]} " == *" grant "* ]]
		COMP_WORDS=(kvmmem grant re) COMP_CWORD=2
		_kvmmem kvmmem re grant
		[[ " ${COMPREPLY[*]} " == *" revoke "* ]]
	'
	head -n 1 /usr/share/zsh/vendor-completions/_kvmmem | grep '^#compdef kvmmem'
	grep '^complete -c kvmmem' /usr/share/fish/vendor_completions.d/kvmmem.fish
}

users() {
	getent passwd kvmmem
	getent group kvmmem
	grep 'GROUP="kvmmem"' /usr/lib/udev/rules.d/60-kvmmem.rules
}

units() {
	systemd-analyze verify kvmmemd.service kvmmemd.socket >"$here/told" 2>&1 || { cat "$here/told"; return 1; }
	fails grep . "$here/told"
	# Of 100; what is left are what it cannot do without: users' sockets, vsock, the host's processes and VMs.
	systemd-analyze security --offline=true --threshold=20 --no-pager kvmmemd.service
	test -L /etc/systemd/system/sockets.target.wants/kvmmemd.socket
}

# What a key of the unit says.
of_unit() {
	sed -n "s/^$1=//p" /usr/lib/systemd/system/kvmmemd.service
}

# The broker as systemd starts it, but for what only systemd can do: user, privileges, folders, socket.
as_unit() {
	test "$(of_unit AmbientCapabilities)" = "$(of_unit CapabilityBoundingSet)" || return 1
	capabilities=-all$(of_unit AmbientCapabilities | tr A-Z a-z | sed 's/ *cap_/,+/g')
	# shellcheck disable=SC2046 # words
	exec setpriv --reuid kvmmem --regid kvmmem --init-groups --bounding-set "$capabilities" \
		--inh-caps "$capabilities" --ambient-caps "$capabilities" --no-new-privs $(of_unit ExecStart)
}

# The broker writes the audit log and its state after it has answered.
wait_for() {
	for _ in $(seq 600); do
		"$@" >/dev/null 2>&1 && return
		sleep 0.1
	done
	"$@"
}

folders() {
	for folder in /run/kvmmem /var/lib/kvmmem /var/log/kvmmem; do
		mkdir -p "$folder"
		chown kvmmem:kvmmem "$folder"
	done
	chmod 0750 /var/log/kvmmem
}

# serve COMMAND...: runs the command while the broker serves.
serve() {
	folders
	as_unit >"$here/kvmmemd.log" 2>&1 &
	pid=$!
	trap 'kill "$pid"' EXIT
	wait_for test -S "$socket"
	"$@"
	trap - EXIT
	kill "$pid"
	wait "$pid"
	test ! -e "$socket"
}

# Root may connect, and the members of the group that owns the socket; other users may not.
answers() {
	kvmmem target list
	fails kvmmem hook add nobody vsock:3:1
	wait_for grep '"event":"refused"' /var/log/kvmmem/audit.log
	fails setpriv --reuid nobody --clear-groups kvmmem target list
}

# Another user's VM, which kvmmemd can read only with its unit's capabilities.
attaches() {
	mkdir -p "$here/vmm"
	cc -Wall -Wextra -Werror -o "$here/vmm/qemu-system-x86_64" "$here/fake_vmm.c"
	setpriv --reuid nobody --regid nogroup --clear-groups "$here/vmm/qemu-system-x86_64" -name guest=web1 -m 32 \
		-machine q35 &
	vmm=$!
	trap 'kill "$vmm" "$pid"' EXIT
	wait_for grep -q memfd:ram "/proc/$vmm/maps"
	kvmmem target add --pid "$vmm"
	kvmmem target list | grep web1
	wait_for grep '"name":"web1"' /var/lib/kvmmem/added.json
	fails setpriv --reuid nobody --clear-groups kvmmem target remove web1
	kill "$vmm"
	trap 'kill "$pid"' EXIT
	wait_for gone
	wait_for forgotten
}

gone() {
	fails kvmmem target remove web1
}

forgotten() {
	fails grep web1 /var/lib/kvmmem/added.json
}

rotates() {
	fails kvmmem hook add nobody vsock:3:1
	wait_for test -s /var/log/kvmmem/audit.log
	logrotate --force --state "$here/state" /etc/logrotate.d/kvmmemd
	test -s /var/log/kvmmem/audit.log.1
	fails kvmmem hook add nobody vsock:3:1
	wait_for test -s /var/log/kvmmem/audit.log
	test "$(stat -c '%U %a' /var/log/kvmmem/audit.log)" = 'kvmmem 600'
}

# Socket activation with systemd's own tool for trying it.
activated() {
	rm -f "$socket"
	folders
	tool="systemd-socket-activate --seqpacket --listen=$socket"
	# shellcheck disable=SC2086 # words
	$tool setpriv --reuid kvmmem --regid kvmmem --init-groups --bounding-set -all --inh-caps -all \
		--no-new-privs /usr/sbin/kvmmemd --config "$config" >"$here/kvmmemd.log" 2>&1 &
	pid=$!
	trap 'kill "$pid"' EXIT
	wait_for test -S "$socket"
	timeout 20 kvmmem target list
	trap - EXIT
	kill "$pid"
	wait "$pid"
	grep listening "$here/kvmmemd.log"
	# kvmmemd leaves a socket that was passed to it.
	rm "$socket"
}

bad_key() {
	echo 'sokcet = "/a"' >"$here/bad.toml"
	fails kvmmemd --config "$here/bad.toml" >"$here/told" 2>&1
	grep sokcet "$here/told"
}

compiles() {
	for example in view marker; do
		# shellcheck disable=SC2046 # words
		cc -Wall -Werror $(pkg-config --cflags kvmmem) -o "$here/$example" \
			"/usr/share/doc/libkvmmem-dev/examples/$example.c"
	done
	test "$(pkg-config --modversion kvmmem)" = "$(kvmmem --version | sed 's/.* //')"
}

# Each kernel that cannot take the module is named with the reason, and the package is installed all the same.
refuses() {
	grep 'kvmmem-dkms: no module is built for 6.12.0-plain' "$here/installed"
	grep 'CONFIG_RUST is not set' "$here/installed"
	grep 'kvmmem-dkms: no module is built for 7.3.0-bare' "$here/installed"
	grep 'Rust metadata is missing' "$here/installed"
	dkms status -m kvmmem | grep 'kvmmem/.*: added'
	# So it is when such a kernel comes later.
	dkms autoinstall -k 7.3.0-bare >"$here/told" 2>&1 || { cat "$here/told"; return 1; }
	cat "$here/told"
	dkms status -m kvmmem | grep 'kvmmem/.*: added'
}

upgrades() {
	echo '# edited' >>"$config"
	install "$here"/two/*.deb
	tail -n 1 "$config" | grep '^# edited$'
	for name in $names; do
		dpkg-query -W -f '${Status} ${Version}\n' "$name" | grep '^install ok installed .*-2$'
	done
	dkms status -m kvmmem | grep 'kvmmem/.*: added'
	test -z "$(dpkg --verify libkvmmem-dev kvmmem kvmmem-dkms)"
}

# Removal keeps what was configured.
removes() {
	# shellcheck disable=SC2086 # a list
	apt-get -q -y remove $names
	test -f "$config"
	test ! -e /usr/sbin/kvmmemd
	test -z "$(dkms status -m kvmmem)"
}

purges() {
	# shellcheck disable=SC2086 # a list
	dpkg --purge $names
	list >"$here/after"
	diff "$here/before" "$here/after"
	# The user stays, as Debian has it.
	getent passwd kvmmem
}

check 'what they need is installed' needs || exit 0
fake_kernels
list >"$here/before"
check 'they are installed without anything else' install_one || exit 0
check 'the programs say their versions' versions
check 'the manual pages are shown' pages
check 'the completions are loaded' completions
check 'user and group are there' users
check 'the units are sound and confined' units
check 'the broker answers with its own privileges' serve answers
check 'the broker attaches the VM of another user' serve attaches
check 'the audit log is rotated' serve rotates
check 'the broker takes a passed socket, and needs no privilege for that' activated
check 'a wrong key of the configuration is named' bad_key
check 'the C examples compile' compiles
check 'a kernel without Rust is refused in words' refuses
check 'an upgrade keeps the configuration' upgrades
check 'a removal keeps the configuration' removes
check 'a purge leaves nothing' purges
exit 0
