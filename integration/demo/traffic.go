package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// clients is how many clients send requests at the same time.
const clients = 32

// shop is the demo's service: a small page, on connections that it closes after
// some responses.
type shop struct {
	mu     sync.Mutex
	served map[string]int // responses per client address
}

const responsesPerConnection = 20

func newShop() http.Handler { return &shop{served: make(map[string]int)} }

// ServeHTTP implements http.Handler.
func (s *shop) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/healthz" {
		return
	}
	s.mu.Lock()
	s.served[r.RemoteAddr]++
	last := s.served[r.RemoteAddr] >= responsesPerConnection
	if last {
		delete(s.served, r.RemoteAddr)
	}
	s.mu.Unlock()
	if last {
		w.Header().Set("Connection", "close")
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "Hello from the backend behind Reseal.\nYou asked for %s at %s, through %s.\n",
		r.URL.Path, r.Host, r.Header.Get("X-Forwarded-Proto"))
}

// traffic sends real HTTPS requests through both edges.
func (d *demo) traffic(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, address := range d.addresses.edges {
		transport := &http.Transport{
			TLSClientConfig: &tls.Config{
				RootCAs: d.authority.Pool(), MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(clients),
			},
			MaxIdleConnsPerHost: clients,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, address)
			},
		}
		client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
		var sender sync.WaitGroup
		for i := range clients {
			sender.Add(1)
			group.Go(func() error {
				defer sender.Done()
				share := (d.requests + clients - 1 - i) / clients
				for n := range share {
					if i == 0 && n == share/2 {
						transport.CloseIdleConnections() // clients come back and resume
					}
					if err := get(ctx, client); err != nil {
						return err
					}
				}
				return nil
			})
		}
		group.Go(func() error {
			sender.Wait()
			transport.CloseIdleConnections()
			return nil
		})
	}
	return group.Wait()
}

func get(ctx context.Context, client *http.Client) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://localhost/hello", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("a request through an edge got %s: %s", resp.Status, body)
	}
	return nil
}

// show prints what the fleet says and what the backend counted itself.
func (d *demo) show(ctx context.Context) error {
	for _, args := range [][]string{{"get", "edges"}, {"stats"}} {
		fmt.Printf("$ resealctl %s\n", strings.Join(args, " "))
		text, err := d.ctl(ctx, args...)
		if err != nil {
			return err
		}
		fmt.Println(text)
	}
	counts, err := d.backend.Counts(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("The backend itself counted %d full and %d resumed TLS handshakes on %d connections for %d requests\n(health checks included).\n",
		counts.Full, counts.Resumed(), counts.Connections, counts.Requests)
	return nil
}

// next says what a newcomer may try.
func (d *demo) next() {
	ctl := d.command("resealctl") + " --config " + filepath.Join(runDir, "controlplane", "admin.yaml")
	bin, err := filepath.Rel(mustGetwd(), d.command("resealctl"))
	if err == nil {
		ctl = bin + " --config " + filepath.Join(runDir, "controlplane", "admin.yaml")
	}
	port := func(address string) string { _, p, _ := net.SplitHostPort(address); return p }
	fmt.Printf(`
Try in another terminal, in this folder:
  curl --cacert .run/tls/ca.pem https://localhost:%s/
  curl --cacert .run/tls/ca.pem https://localhost:%s/
  alias ctl='%s'
  ctl stats -w
  ctl get backendpools,listeners,routes
  ctl describe backendpool app
  ctl get backendpool app -o yaml > app.yaml    # change it, then: ctl diff -f app.yaml; ctl apply -f app.yaml
  ctl history
  curl -s http://%s/metrics | grep ^reseal_tls
  tail -f .run/access-a.log

Ctrl-C stops everything.
`, port(d.addresses.edges[0]), port(d.addresses.edges[1]), ctl, d.addresses.admin[0])
}

func mustGetwd() string {
	dir, err := os.Getwd()
	if err != nil {
		return "/"
	}
	return dir
}

// ctl runs resealctl with the admin context.
func (d *demo) ctl(ctx context.Context, args ...string) (string, error) {
	args = append([]string{"--config", filepath.Join(runDir, "controlplane", "admin.yaml")}, args...)
	cmd := exec.CommandContext(ctx, d.command("resealctl"), args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("resealctl %s: %w\n%s", strings.Join(args[2:], " "), err, stderr.String())
	}
	return string(out), nil
}
