// Package rivals runs HAProxy and nginx as Reseal runs: between TLS clients and
// TLS backends. Benchmarks measure against them, and tests of message framing
// compare with them what reaches the backend.
package rivals

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// Site is one listener and the backend behind it.
type Site struct {
	// Address is where clients connect, host:port.
	Address string
	// Backend is host:port of a TLS server with a certificate for
	// peers.ServerName.
	Backend string
	// HTTP2 speaks HTTP/2 to the backend. nginx can't; it leaves the site out.
	HTTP2 bool
}

// Config is what a rival is started with. It is otherwise configured as its manual
// advises for this job: connections and TLS sessions to the backend are kept, the
// backend's certificate is verified, requests are logged.
type Config struct {
	// Dir is an empty directory for its files. Required.
	Dir string
	// Authority issues the certificate that clients see, and is what backends are
	// verified with. Required.
	Authority *peers.Authority
	// Names are in that certificate. Required.
	Names []string
	// Threads is how many threads or workers it has. Default: 1.
	Threads int
	// Connections is how many it takes at the same time. Default: 4096.
	Connections int
	// Sites are its listeners. Required.
	Sites []Site
}

// Program is an installed or unpacked HAProxy or nginx.
type Program struct {
	// Key names it in flags: "haproxy", or "haproxy-new" for that of
	// integration/bench/peers.sh.
	Key string
	// Name is "HAProxy" or "nginx".
	Name string
	// New is one of integration/bench/peers.sh.
	New bool

	path    string
	install string
	files   func(Config, files, string) (process.Config, error)
}

// Programs are those that can be had, installed or not.
func Programs() []Program {
	var all []Program
	for _, newest := range []bool{false, true} {
		for _, p := range []Program{
			{Key: "haproxy", Name: "HAProxy", files: haproxyFiles},
			{Key: "nginx", Name: "nginx", files: nginxFiles},
		} {
			p.path = p.Key
			if p.New = newest; newest {
				p.path, p.install = filepath.Join(tools(), "peers", "bin", p.Key), "run integration/bench/peers.sh"
				p.Key += "-new"
			}
			all = append(all, p)
		}
	}
	return all
}

// tools is .tools of the checkout that the caller runs in.
func tools() string {
	dir, err := os.Getwd()
	for err == nil && dir != filepath.Dir(dir) {
		if _, missing := os.Stat(filepath.Join(dir, "go.mod")); missing == nil {
			return filepath.Join(dir, ".tools")
		}
		dir = filepath.Dir(dir)
	}
	return ".tools"
}

var versionNumber = regexp.MustCompile(`\d+\.\d+(\.\d+)*`)

// Version is what the program says about itself, such as "2.6.12". It fails with
// process.ErrMissing when it is not installed.
func (p Program) Version() (string, error) {
	path, err := process.Find(p.path, p.install)
	if err != nil {
		return "", err
	}
	output, err := exec.Command(path, "-v").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s -v: %w: %s", p.path, err, output)
	}
	return versionNumber.FindString(string(output)), nil
}

// files are the paths of what every rival needs.
type files struct {
	certificate, key, both string // what clients see
	authority              string // what backends are verified with
	probe                  string // an address that answers in the clear when it is up
}

// Proxy is a running rival.
type Proxy struct {
	*process.Process

	log  *net.UnixConn // HAProxy's; nil for nginx
	logs sync.WaitGroup
}

// Start starts the program and waits until it serves.
func (p Program) Start(ctx context.Context, config Config) (*Proxy, error) {
	if config.Threads == 0 {
		config.Threads = 1
	}
	if config.Connections == 0 {
		config.Connections = 4096
	}
	version, err := p.Version()
	if err != nil {
		return nil, err
	}
	written, err := config.write()
	if err != nil {
		return nil, err
	}
	how, err := p.files(config, written, version)
	if err != nil {
		return nil, err
	}
	how.Name, how.Path, how.Install = p.Key, p.path, p.install
	proxy := &Proxy{}
	if p.Name == "HAProxy" {
		if err := proxy.collect(filepath.Join(config.Dir, logSocket)); err != nil {
			return nil, err
		}
	}
	if proxy.Process, err = process.Start(how); err != nil {
		return nil, errors.Join(err, proxy.endLog())
	}
	ready, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := proxy.WaitReady(ready, func(context.Context) error { return process.Listening(written.probe) }); err != nil {
		return nil, errors.Join(err, proxy.Stop())
	}
	return proxy, nil
}

// Stop ends it with SIGTERM.
func (p *Proxy) Stop() error { return errors.Join(p.Process.Stop(), p.endLog()) }

// PIDs are the ids of its processes: HAProxy has one, nginx a master and workers.
func (p *Proxy) PIDs() ([]int, error) {
	pids := []int{p.PID()}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.PID()))
	if err != nil {
		return nil, err
	}
	for _, field := range bytes.Fields(data) {
		pid, err := strconv.Atoi(string(field))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// logSocket is where HAProxy sends its log, in Config.Dir, as to a syslog daemon.
const logSocket = "log"

// collect takes what HAProxy logs, and forgets it.
func (p *Proxy) collect(path string) error {
	log, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	p.log = log
	p.logs.Go(func() {
		for line := make([]byte, 4<<10); ; {
			if _, _, err := log.ReadFromUnix(line); err != nil {
				return
			}
		}
	})
	return nil
}

func (p *Proxy) endLog() error {
	if p.log == nil {
		return nil
	}
	err := p.log.Close()
	p.logs.Wait()
	p.log = nil
	return err
}

// write writes what every rival needs.
func (c Config) write() (files, error) {
	pair, err := c.Authority.Issue(c.Names...)
	if err != nil {
		return files{}, err
	}
	w := files{authority: filepath.Join(c.Dir, "ca.crt")}
	if w.certificate, w.key, w.both, err = pair.Write(c.Dir, "site"); err != nil {
		return files{}, err
	}
	if w.probe, err = process.FreeAddress(); err != nil {
		return files{}, err
	}
	return w, os.WriteFile(w.authority, c.Authority.PEM(), 0o600)
}

// older reports whether a version is below another; "1.9" is older than "1.25".
func older(version, than string) bool {
	a, b := strings.Split(version, "."), strings.Split(than, ".")
	for i := range min(len(a), len(b)) {
		m, _ := strconv.Atoi(a[i])
		n, _ := strconv.Atoi(b[i])
		if m != n {
			return m < n
		}
	}
	return len(a) < len(b)
}
