package containers

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// docker is the set of networks and containers of one test. All their names
// begin with the test's prefix, and all are removed at its end.
type docker struct {
	t          *testing.T
	prefix     string
	containers []string
	networks   []string
}

// needDocker skips the test unless a Docker engine answers.
func needDocker(t *testing.T) *docker {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "docker", "version", "--format", "{{.Server.Version}}").CombinedOutput(); err != nil {
		t.Skipf("no Docker engine answers (install docker.io and start it): %v: %s", err, out)
	}
	d := &docker{t: t, prefix: fmt.Sprintf("reseal-test-%d-", os.Getpid())}
	t.Cleanup(d.remove)
	return d
}

// run is a docker command that must succeed.
func (d *docker) run(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

func (d *docker) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "docker", args...).CombinedOutput()
	return string(out), err
}

// network makes a network of this test alone.
func (d *docker) network(name string) string {
	d.t.Helper()
	d.networks = append(d.networks, d.prefix+name)
	d.run("network", "create", d.prefix+name)
	return d.prefix + name
}

// container says what to start.
type container struct {
	name     string            // also its alias in every network
	image    string            // without tag
	networks []string          // the first one publishes the ports
	publish  []string          // as of docker run -p
	files    map[string]string // path in the container → content
	args     []string
}

// start makes a container, puts its files in and starts it.
func (d *docker) start(c container) {
	d.t.Helper()
	name := d.prefix + c.name
	args := []string{"create", "--name", name, "--hostname", c.name, "--network", c.networks[0], "--network-alias", c.name}
	for _, port := range c.publish {
		args = append(args, "-p", port)
	}
	args = append(args, "reseal/"+c.image+":"+imageTag)
	d.containers = append(d.containers, name)
	d.run(append(args, c.args...)...)
	for _, network := range c.networks[1:] {
		d.run("network", "connect", "--alias", c.name, network, name)
	}
	for path, content := range c.files {
		local := filepath.Join(d.t.TempDir(), filepath.Base(path))
		if err := os.WriteFile(local, []byte(content), 0o644); err != nil {
			d.t.Fatal(err)
		}
		d.run("cp", local, name+":"+path)
	}
	d.run("start", name)
}

// remove ends and removes everything, and shows the containers' logs when the
// test has failed.
func (d *docker) remove() {
	for _, name := range d.containers {
		if d.t.Failed() {
			if out, err := d.try("logs", "--tail", "40", name); err == nil {
				d.t.Logf("%s printed:\n%s", name, out)
			}
		}
		if out, err := d.try("rm", "--force", "--volumes", name); err != nil {
			d.t.Errorf("container %s is left: %v: %s", name, err, out)
		}
	}
	for _, name := range d.networks {
		if out, err := d.try("network", "rm", name); err != nil {
			d.t.Errorf("network %s is left: %v: %s", name, err, out)
		}
	}
	for _, image := range images {
		if out, err := d.try("rmi", "reseal/"+image+":"+imageTag); err != nil {
			d.t.Logf("image %s is left: %v: %s", image, err, out)
		}
	}
}
