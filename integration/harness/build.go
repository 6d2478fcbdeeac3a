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

	"go.uber.org/goleak"
)

// Module is the path of the module that is tested.
const Module = "github.com/reseal/reseal"

// Binaries are the paths of the built commands.
type Binaries struct {
	ControlPlane, Edge, Ctl string
}

// builds keeps the directories of the built commands, by whether the daemons
// have the race detector: tests of one package share them.
var builds struct {
	sync.Mutex
	dirs map[bool]string
}

// build builds the commands, once per process and kind. RESEAL_BIN names a
// directory with ready ones instead. Main removes what was built.
func build(race bool) (Binaries, error) {
	dir := os.Getenv("RESEAL_BIN")
	if dir == "" {
		var err error
		if dir, err = buildOnce(race); err != nil {
			return Binaries{}, err
		}
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

func buildOnce(race bool) (string, error) {
	builds.Lock()
	defer builds.Unlock()
	if dir := builds.dirs[race]; dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "reseal-bin-")
	if err != nil {
		return "", err
	}
	// Tests start resealctl hundreds of times; its own tests look for races.
	if err := errors.Join(goBuild(dir, race, "reseal-controlplane", "reseal-edge"), goBuild(dir, false, "resealctl")); err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	if builds.dirs == nil {
		builds.dirs = make(map[bool]string)
	}
	builds.dirs[race] = dir
	return dir, nil
}

// goBuild builds commands of this module into dir.
func goBuild(dir string, race bool, commands ...string) error {
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

// RemoveBuilds removes the built commands. It is for programs; tests have Main.
func RemoveBuilds() error {
	builds.Lock()
	defer builds.Unlock()
	var errs []error
	for _, dir := range builds.dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	builds.dirs = nil
	return errors.Join(errs...)
}

// Main runs the tests of a package, looks for leaked goroutines, and removes the
// built commands. It is for TestMain, which passes the result to os.Exit.
func Main(m *testing.M) int {
	code := m.Run()
	if err := RemoveBuilds(); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "removing the built commands:", err)
		code = max(code, 1)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}
