// Command demo is `make run`: a whole Reseal fleet on this machine, with a TLS
// backend and real traffic, until Ctrl-C.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// runDir holds all files of a run.
const runDir = ".run"

func main() {
	bin := flag.String("bin", "bin", "folder with the built commands")
	examples := flag.String("examples", "deploy/examples", "folder with the manifests")
	requests := flag.Int("requests", 2000, "requests per edge")
	once := flag.Bool("once", false, "end after the first traffic instead of at Ctrl-C")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	d := &demo{bin: *bin, examples: *examples, requests: *requests}
	err := d.run(ctx, *once)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil // Ctrl-C came early
	}
	stop()
	if err := errors.Join(err, d.close()); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
	fmt.Println("All stopped; nothing is left behind.")
}

type demo struct {
	bin, examples string
	requests      int

	authority *peers.Authority
	backend   *peers.Backend
	processes []*process.Process // in the order of their start
	addresses addresses
	owned     bool // whether runDir is ours to remove
}

// addresses are those of the examples, or free ones where they are in use.
type addresses struct {
	control, page string
	edges, admin  [2]string
	changed       bool
}

var edgeNames = [2]string{"a", "b"}

func (d *demo) run(ctx context.Context, once bool) error {
	steps := []struct {
		say string
		do  func(context.Context) error
	}{
		{"certificates and a TLS backend", d.startBackend},
		{"control plane with an embedded etcd", d.startControlPlane},
		{"two edges, enrolled with join tokens", d.startEdges},
		{"example manifests", d.applyExamples},
	}
	started := time.Now()
	for _, step := range steps {
		fmt.Printf("%-42s ", step.say+" …")
		if err := step.do(ctx); err != nil {
			fmt.Println("failed")
			return err
		}
		fmt.Println("ok")
	}
	fmt.Printf("\nServing after %.1f s. Sending %d requests through each edge: 32 clients, and the backend closes\nits connection after every 20 responses, so that sessions have to be resumed.\n\n",
		time.Since(started).Seconds(), d.requests)
	if err := d.traffic(ctx); err != nil {
		return err
	}
	if err := d.show(ctx); err != nil {
		return err
	}
	if once {
		return nil
	}
	d.next()
	return d.wait(ctx)
}

// startBackend makes the certificates and a backend that counts its handshakes.
func (d *demo) startBackend(context.Context) error {
	if err := d.claimRunDir(); err != nil {
		return err
	}
	var err error
	if d.authority, err = peers.NewAuthority("Reseal demo"); err != nil {
		return err
	}
	tlsDir := filepath.Join(runDir, "tls")
	if err := os.MkdirAll(tlsDir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tlsDir, "ca.pem"), d.authority.PEM(), 0o644); err != nil {
		return err
	}
	site, err := d.authority.Issue("localhost", "127.0.0.1")
	if err != nil {
		return err
	}
	certificate, key, _, err := site.Write(tlsDir, "site")
	if err != nil {
		return err
	}
	if err := errors.Join(rename(certificate, filepath.Join(tlsDir, "site.pem")), rename(key, filepath.Join(tlsDir, "site.key"))); err != nil {
		return err
	}
	d.backend, err = peers.GoWith(peers.Options{
		Authority: d.authority, Dir: tlsDir, Mode: peers.TLS13, Names: []string{"app.internal"},
	}, newShop())
	return err
}

func rename(from, to string) error {
	if from == to {
		return nil
	}
	return os.Rename(from, to)
}

// claimRunDir makes runDir. One that a killed run left is removed; one in use
// is an error.
func (d *demo) claimRunDir() error {
	lock := filepath.Join(runDir, "pid")
	if data, err := os.ReadFile(lock); err == nil {
		if _, err := os.Stat("/proc/" + strings.TrimSpace(string(data)) + "/stat"); err == nil {
			return fmt.Errorf("another `make run` (process %s) uses %s: end it first", strings.TrimSpace(string(data)), runDir)
		}
	}
	if err := os.RemoveAll(runDir); err != nil {
		return err
	}
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return err
	}
	d.owned = true
	return os.WriteFile(lock, fmt.Appendln(nil, os.Getpid()), 0o600)
}

func (d *demo) startControlPlane(ctx context.Context) error {
	var err error
	if d.addresses, err = chooseAddresses(); err != nil {
		return err
	}
	plane, err := d.start("reseal-controlplane",
		"--data-dir", filepath.Join(runDir, "controlplane"),
		"--listen", d.addresses.control, "--http", d.addresses.page)
	if err != nil {
		return err
	}
	return plane.WaitReady(ctx, probe("http://"+d.addresses.page+"/readyz"))
}

func (d *demo) startEdges(ctx context.Context) error {
	for i, name := range edgeNames {
		token, err := d.ctl(ctx, "token", "create", "--id", "edge-"+name, "--labels", "edge="+name, "-o", "name")
		if err != nil {
			return err
		}
		tokenFile := filepath.Join(runDir, "token-"+name)
		if err := os.WriteFile(tokenFile, []byte(token), 0o600); err != nil {
			return err
		}
		_, err = d.start("reseal-edge",
			"--id", "edge-"+name, "--labels", "edge="+name,
			"--control-plane", d.addresses.control, "--join-token-file", tokenFile,
			"--state-dir", filepath.Join(runDir, "edge-"+name),
			"--admin", d.addresses.admin[i],
			"--access-log", filepath.Join(runDir, "access-"+name+".log"))
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) applyExamples(ctx context.Context) error {
	dir, err := d.localExamples()
	if err != nil {
		return err
	}
	if _, err := d.ctl(ctx, "apply", "-f", dir, "-m", "first configuration"); err != nil {
		return err
	}
	for i := range edgeNames {
		edge := d.processes[len(d.processes)-len(edgeNames)+i]
		// It is ready without a listener, too, as it was before the examples came.
		ready := probe("http://" + d.addresses.admin[i] + "/readyz")
		if err := edge.WaitReady(ctx, func(ctx context.Context) error {
			return errors.Join(ready(ctx), process.Listening(d.addresses.edges[i]))
		}); err != nil {
			return err
		}
	}
	return nil
}

// localExamples is a folder with the manifests for this run: the examples with
// the addresses that were free and the files of runDir.
func (d *demo) localExamples() (string, error) {
	files, err := filepath.Glob(filepath.Join(d.examples, "*.yaml"))
	if err != nil || len(files) == 0 {
		return "", fmt.Errorf("no manifests in %s", d.examples)
	}
	dir := filepath.Join(runDir, "manifests")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	here, err := filepath.Abs(runDir)
	if err != nil {
		return "", err
	}
	replace := strings.NewReplacer("/etc/reseal/tls", filepath.Join(here, "tls"), "127.0.0.1:9443", d.backend.Address,
		"127.0.0.1:8443", d.addresses.edges[0], "127.0.0.1:8444", d.addresses.edges[1])
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(file)), []byte(replace.Replace(string(data))), 0o600); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// start runs one of the commands.
func (d *demo) start(command string, args ...string) (*process.Process, error) {
	p, err := process.Start(process.Config{Path: d.command(command), Args: args, Install: "run `make build`"})
	if err != nil {
		return nil, err
	}
	d.processes = append(d.processes, p)
	return p, nil
}

func (d *demo) command(name string) string { return filepath.Join(d.bin, name) }

// close ends everything in reverse order and removes the files.
func (d *demo) close() error {
	fmt.Println("\nStopping …")
	var errs []error
	for i := len(d.processes) - 1; i >= 0; i-- {
		errs = append(errs, d.processes[i].Stop())
	}
	if d.backend != nil {
		errs = append(errs, d.backend.Stop())
	}
	if d.owned {
		errs = append(errs, os.RemoveAll(runDir))
	}
	return errors.Join(errs...)
}

// wait returns when ctx ends or a process did.
func (d *demo) wait(ctx context.Context) error {
	ended := make(chan *process.Process, len(d.processes))
	for _, p := range d.processes {
		go func() {
			<-p.Done()
			ended <- p
		}()
	}
	select {
	case <-ctx.Done():
		return nil
	case p := <-ended:
		return fmt.Errorf("%s ended (%w); it printed:\n%s", p.Name(), p.Err(), p.Output())
	}
}

// chooseAddresses takes the usual ports, or free ones where they are in use.
func chooseAddresses() (addresses, error) {
	var chosen addresses
	var errs []error
	choose := func(preferred string) string {
		if listener, err := net.Listen("tcp", preferred); err == nil {
			listener.Close()
			return preferred
		}
		chosen.changed = true
		address, err := process.FreeAddress()
		errs = append(errs, err)
		return address
	}
	chosen.control = choose("127.0.0.1:7443")
	chosen.page = choose("127.0.0.1:7480")
	chosen.edges = [2]string{choose("127.0.0.1:8443"), choose("127.0.0.1:8444")}
	chosen.admin = [2]string{choose("127.0.0.1:7481"), choose("127.0.0.1:7482")}
	return chosen, errors.Join(errs...)
}

// probe asks a /readyz.
func probe(url string) func(context.Context) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Second}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", url, resp.Status)
		}
		return nil
	}
}
