package upgrade

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Variable is the environment variable that tells a successor which descriptor leads to
// its predecessor.
const Variable = "RESEAL_EDGE_UPGRADE_FD"

// notInherited are variables that are about the process that they were given to.
var notInherited = []string{Variable, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"}

// Program is what a successor runs.
type Program struct {
	// Path of the executable. It is looked at when the program is started, so what
	// has replaced the file by then is what runs.
	Path string
	// Args are its arguments, without its name.
	Args []string
	// Stdout and Stderr are where it writes.
	Stdout, Stderr io.Writer
}

// Executable is the path under which this process was started, if that still leads
// somewhere: a link to a release that was turned to another one leads to the new one.
// Call it before the working directory is changed.
func Executable() (string, error) {
	running, err := os.Executable()
	if err != nil {
		return "", err
	}
	named, err := exec.LookPath(os.Args[0])
	if err != nil {
		return running, nil
	}
	if named, err = filepath.Abs(named); err != nil || !sameFile(named, running) {
		return running, nil
	}
	return named, nil
}

func sameFile(a, b string) bool {
	one, err := os.Stat(a)
	if err != nil {
		return false
	}
	other, err := os.Stat(b)
	return err == nil && os.SameFile(one, other)
}

// Child is a successor that was started.
type Child struct {
	// Conn leads to it.
	Conn *net.UnixConn

	command *exec.Cmd
	ended   chan struct{}
	err     error // how it ended; set before ended is closed
}

// Start starts the program as a successor.
func (p Program) Start() (*Child, error) {
	conn, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	command := exec.Command(p.Path, p.Args...)
	command.Stdout, command.Stderr = p.Stdout, p.Stderr
	command.ExtraFiles = []*os.File{theirs} // descriptor 3
	command.Env = append(environment(), Variable+"=3")
	if err := command.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", p.Path, err), conn.Close())
	}
	child := &Child{Conn: conn, command: command, ended: make(chan struct{})}
	go func() {
		child.err = command.Wait()
		close(child.ended)
	}()
	return child, nil
}

func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.Contains(notInherited, name)
	})
}

// PID is its process id.
func (c *Child) PID() int { return c.command.Process.Pid }

// endTime is how long a child that lost its predecessor's end of the channel has to
// end by itself.
const endTime = 2 * time.Second

// End ends the child and returns how it ended. After it nothing of the child is left,
// so whatever it was given is the caller's alone.
func (c *Child) End() error {
	_ = c.Conn.Close() // maybe it is
	timer := time.NewTimer(endTime)
	defer timer.Stop()
	select {
	case <-c.ended:
	case <-timer.C:
		_ = c.command.Process.Kill() // fails only when it has ended
		<-c.ended
	}
	return c.err
}

// Parent is the connection to the predecessor, or nil in a process that is nobody's
// successor. It removes Variable from the environment.
func Parent() (*net.UnixConn, error) {
	text, ok := os.LookupEnv(Variable)
	if !ok {
		return nil, nil
	}
	_ = os.Unsetenv(Variable) // fails only for impossible names
	fd, err := strconv.Atoi(text)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%s: %q is not a descriptor", Variable, text)
	}
	return unixConn(os.NewFile(uintptr(fd), "predecessor"))
}
