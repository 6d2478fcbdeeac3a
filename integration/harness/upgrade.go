package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Upgradable is an edge that may be replaced by a process of its own making. Its Process
// is a supervisor that stands for all of them.
type Upgradable struct {
	*Edge
	// Binary is the file that an upgrade starts.
	Binary string
}

// StartUpgradable is StartEdge for an edge that will be upgraded, from a program file of
// its own.
func (f *Fleet) StartUpgradable(id, labels string, args ...string) *Upgradable {
	f.TB.Helper()
	pidFile, supervisor := filepath.Join(f.Dir, "pid-"+id), filepath.Join(f.Dir, "supervisor")
	build := exec.Command("go", "build", "-o", supervisor, Module+"/integration/process/supervisor")
	if output, err := build.CombinedOutput(); err != nil {
		f.TB.Fatalf("go build: %v\n%s", err, output)
	}
	e := &Upgradable{Edge: f.newEdge(nil, id, labels, append(args, "--pid-file", pidFile)...), Binary: filepath.Join(f.Dir, "edge-"+id)}
	e.Install()
	e.Program, e.Edge.args = supervisor, append([]string{pidFile, e.Binary}, e.Edge.args...)
	e.Start()
	return e
}

// Install replaces the edge's program file by a fresh copy, as packages do.
func (e *Upgradable) Install() {
	e.fleet.TB.Helper()
	data, err := os.ReadFile(e.fleet.bin.Edge)
	if err != nil {
		e.fleet.TB.Fatal(err)
	}
	e.InstallThis(data)
}

// InstallThis makes the program file hold something else.
func (e *Upgradable) InstallThis(content []byte) {
	e.fleet.TB.Helper()
	fresh := e.Binary + ".new"
	if err := os.WriteFile(fresh, content, 0o755); err != nil {
		e.fleet.TB.Fatal(err)
	}
	if err := os.Rename(fresh, e.Binary); err != nil {
		e.fleet.TB.Fatal(err)
	}
}

// UpgradeState is what the admin page says of upgrades.
type UpgradeState struct {
	PID         int
	Version     string
	BootID      string
	Predecessor *struct {
		PID, Connections int
		Version          string
	}
}

// State reads the admin page.
func (e *Upgradable) State() (UpgradeState, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	var state UpgradeState
	body, err := e.fleet.get(ctx, "http://"+e.Admin+"/upgrade")
	if err == nil {
		err = json.Unmarshal(body, &state)
	}
	return state, err
}

// Order asks for an upgrade.
func (e *Upgradable) Order() { e.Signal(syscall.SIGUSR2) }

// Upgrade replaces the process by a new one, from a fresh program file, and waits until
// that one serves.
func (e *Upgradable) Upgrade() UpgradeState {
	e.fleet.TB.Helper()
	before, err := e.State()
	if err != nil {
		e.fleet.TB.Fatal(err)
	}
	e.Install()
	e.Order()
	var now UpgradeState
	Settle(e.fleet.TB, func() error {
		now, err = e.State()
		if err == nil && now.PID == before.PID {
			err = fmt.Errorf("process %d still serves", now.PID)
		}
		return err
	})
	return now
}

// Logged reports whether the log of one of the processes holds a text.
func (e *Upgradable) Logged(text string) bool {
	return bytes.Contains([]byte(e.Output()), []byte(text))
}

// Serves is the process that the pid file names.
func (e *Upgradable) Serves() (int, error) {
	file, err := os.Open(filepath.Join(e.fleet.Dir, "pid-"+e.ID))
	if err != nil {
		return 0, err
	}
	defer file.Close()
	text, err := io.ReadAll(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(bytes.TrimSpace(text)))
}

// Gone waits until a process has ended.
func (e *Upgradable) Gone(pid int) {
	e.fleet.TB.Helper()
	deadline := time.Now().Add(startTimeout)
	for syscall.Kill(pid, 0) == nil {
		if time.Now().After(deadline) {
			e.fleet.TB.Fatalf("process %d does not end", pid)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
