package daemon

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What systemd and the daemons have to tell each other: sd_notify(3) and
// sd_listen_fds(3).

const (
	// Ready says that the start, or a reload, is done.
	Ready = "READY=1"
	// Stopping says that the daemon ends.
	Stopping = "STOPPING=1"
	// firstInherited is the first descriptor that a daemon is started with.
	firstInherited = 3
	// maxInherited bounds those.
	maxInherited = 1024
)

// Reloading says that the daemon is busy until it says Ready.
func Reloading() string {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // never fails
	return fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000)
}

// Successor says that another process is the daemon from now on.
func Successor(pid int) string { return fmt.Sprintf("MAINPID=%d", pid) }

// Notify tells systemd, which started the daemon with Type=notify. Without systemd it
// does nothing. Assignments are lines.
func Notify(assignments ...string) error {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil
	}
	if address[0] == '@' {
		address = "\x00" + address[1:]
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(strings.Join(assignments, "\n"))); err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	return nil
}

// Inherited are the sockets that a unit of systemd has opened for this process. Their
// variables are removed from the environment, since they are not for its children.
func Inherited() ([]*os.File, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name) // fails only for impossible names
	}
	if count == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxInherited {
		return nil, fmt.Errorf("LISTEN_FDS: %q is not a number of sockets up to %d", count, maxInherited)
	}
	named := strings.Split(names, ":")
	var files []*os.File
	for i := range n {
		unix.CloseOnExec(firstInherited + i)
		name := "socket"
		if i < len(named) && named[i] != "" {
			name = named[i]
		}
		files = append(files, os.NewFile(uintptr(firstInherited+i), name))
	}
	return files, nil
}
