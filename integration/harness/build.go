// Package harness runs control planes, edges and resealctl as real processes
// for integration tests.
package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// Module is the path of the module that is tested.
const Module = "github.com/reseal/reseal"

// Binaries are the paths of the built commands.
type Binaries struct {
	ControlPlane, Edge, Ctl string
}

// builds keeps one result per process: tests of one package share it.
var builds struct {
	once sync.Once
	dir  string
	err  error
}

// Build builds the commands, once per process. RESEAL_BIN names a directory
// with ready ones instead. Under the race detector the commands are built with
// it too. Main removes what was built.
func Build() (Binaries, error) {
	dir := os.Getenv("RESEAL_BIN")
	if dir == "" {
		builds.once.Do(func() {
			if builds.dir, builds.err = os.MkdirTemp("", "reseal-bin-"); builds.err == nil {
				builds.err = GoBuild(builds.dir, raceDetector, "reseal-controlplane", "reseal-edge", "resealctl")
			}
		})
		if builds.err != nil {
			return Binaries{}, builds.err
		}
		dir = builds.dir
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Binaries{}, err
	}
	b := Binaries{
		ControlPlane: filepath.Join(dir, "reseal-controlplane"),
		Edge:         filepath.Join(dir, "reseal-edge"),
		Ctl:          filepath.Join(dir, "resealctl"),
	}
	for _, path := range []string{b.ControlPlane, b.Edge, b.Ctl} {
		if _, err := os.Stat(path); err != nil {
			return Binaries{}, fmt.Errorf("%w: build it with `make build`, or unset RESEAL_BIN", err)
		}
	}
	return b, nil
}

// GoBuild builds commands of this module into dir.
func GoBuild(dir string, race bool, commands ...string) error {
	args := []string{"build", "-o", dir + string(filepath.Separator)}
	environment := os.Environ()
	if race {
		args = append(args, "-race")
	} else {
		environment = append(environment, "CGO_ENABLED=0")
	}
	for _, command := range commands {
		args = append(args, Module+"/cmd/"+command)
	}
	build := exec.Command("go", args...)
	build.Env = environment
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, output)
	}
	return nil
}

// Main runs the tests of a package and removes the built commands. It is for
// TestMain, which passes the result to os.Exit.
func Main(m *testing.M) int {
	code := m.Run()
	if builds.dir != "" {
		if err := os.RemoveAll(builds.dir); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, errors.Join(errors.New("removing the built commands"), err))
			code = max(code, 1)
		}
	}
	return code
}
