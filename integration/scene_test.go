package integration

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// stage is a fleet of one edge with one listener, on which scenes are played.
type stage struct {
	*world
	edge    *harness.Edge
	address string
}

func newStage(t *testing.T) *stage {
	t.Helper()
	s := &stage{world: newWorld(t)}
	s.StartControlPlane()
	s.edge = s.StartEdge("one", "")
	s.address = s.Address()
	s.WaitAcked(s.Apply(harness.Certificate("site", s.Pair)+harness.Listener("web", s.address, "", "")), s.edge)
	return s
}

// scene is a pool of its own with one backend, and a client that gets there.
type scene struct {
	*stage
	t      *testing.T
	pool   string
	client *http.Client
	// backend was launched last; all of them listen at the same address.
	backend *peers.Backend
	at      string
}

type launcher func(context.Context, peers.Options) (*peers.Backend, error)

// scene names a new pool.
func (s *stage) scene(t *testing.T, pool string) *scene {
	t.Helper()
	at, err := process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return &scene{stage: s, t: t, pool: pool, client: s.Client(t, s.address, false), at: at}
}

// start launches the scene's backend.
func (s *scene) start(start launcher, o peers.Options) {
	s.t.Helper()
	o.Address = s.at
	s.backend = s.Launch(s.t, start, o)
	// One that hangs could not be stopped.
	s.t.Cleanup(func() { s.backend.Signal(syscall.SIGCONT) })
}

// restart stops the backend and launches another one at its address.
func (s *scene) restart(start launcher, o peers.Options) {
	s.t.Helper()
	if err := s.backend.Stop(); err != nil {
		s.t.Fatal(err)
	}
	s.start(start, o)
}

// apply puts the pool into force, with more lines of its spec.
func (s *scene) apply(more string) {
	s.t.Helper()
	s.applyWith(more, "")
}

// applyWith is apply with further manifests.
func (s *scene) applyWith(more, manifests string) {
	s.t.Helper()
	pool := s.Pool(s.pool, []*peers.Backend{s.backend}, more)
	s.WaitAcked(s.Apply(pool+harness.Route(s.pool, "web", s.host(), s.pool, "")+manifests), s.edge)
}

func (s *scene) host() string { return s.pool + "." + harness.SiteName }

func (s *scene) url(path string) string { return "https://" + s.host() + path }

// get makes a request that must succeed.
func (s *scene) get() {
	s.t.Helper()
	if err := harness.Get(s.t.Context(), s.client, s.url(peers.Small), peers.Body(peers.Small)); err != nil {
		s.t.Fatal(err)
	}
}

// fetch makes requests at the same time, on a connection each. The result gives
// one error or nil per request.
func (s *scene) fetch(n int) <-chan error {
	done := make(chan error, n)
	for range n {
		client := s.Client(s.t, s.address, false)
		go func() { done <- harness.Get(s.t.Context(), client, s.url(peers.Small), peers.Body(peers.Small)) }()
	}
	return done
}

// explained waits until the pool's full handshakes have exactly these reasons.
func (s *scene) explained(want map[string]int64) {
	s.t.Helper()
	harness.Settle(s.t, func() error {
		stats := s.PoolStats(s.pool)
		switch {
		case !maps.Equal(stats.Misses, want):
			return fmt.Errorf("misses %v, want %v; handshakes %+v", stats.Misses, want, stats.Handshakes)
		case stats.Missed() != stats.Handshakes.Full:
			return fmt.Errorf("misses %v don't add up to %d full handshakes", stats.Misses, stats.Handshakes.Full)
		}
		return nil
	})
}

// closed waits until the pool's connections ended in exactly these ways.
func (s *scene) closed(want map[string]int64) {
	s.t.Helper()
	harness.Settle(s.t, func() error {
		stats := s.PoolStats(s.pool)
		open := stats.Connections.Opened
		for _, n := range stats.Closes {
			open -= n
		}
		switch {
		case !maps.Equal(stats.Closes, want):
			return fmt.Errorf("closes %v, want %v; connections %+v", stats.Closes, want, stats.Connections)
		case open != 0:
			return fmt.Errorf("closes %v don't add up to %d connections", stats.Closes, stats.Connections.Opened)
		}
		return nil
	})
}

// sockets counts connections as the kernel sees them at the backend's port.
type sockets struct {
	// established is the client's ends, those of the accept queue included.
	established int
	// unread is the backend's ends with bytes that it has not read, unsent the
	// client's ends with bytes that the kernel could not send or that the backend
	// has not acknowledged.
	unread, unsent int
}

// sockets reads the table of TCP connections (proc_net_tcp(5)).
func (s *scene) sockets() sockets {
	s.t.Helper()
	_, text, err := net.SplitHostPort(s.at)
	if err != nil {
		s.t.Fatal(err)
	}
	number, err := strconv.Atoi(text)
	if err != nil {
		s.t.Fatal(err)
	}
	port := fmt.Sprintf(":%04X", number)
	file, err := os.Open("/proc/net/tcp")
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	const established = "01"
	var found sockets
	for lines := bufio.NewScanner(file); lines.Scan(); {
		// sl local_address rem_address st tx_queue:rx_queue ...
		fields := strings.Fields(lines.Text())
		if len(fields) < 5 || fields[3] != established {
			continue
		}
		unsent, unread, _ := strings.Cut(fields[4], ":")
		const none = "00000000"
		if strings.HasSuffix(fields[2], port) {
			found.established++
			if unsent != none {
				found.unsent++
			}
		}
		if strings.HasSuffix(fields[1], port) && unread != none {
			found.unread++
		}
	}
	return found
}

// await waits until the kernel's view satisfies a condition.
func (s *scene) await(what string, condition func(sockets) bool) {
	s.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		found := s.sockets()
		if condition(found) {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("waited for %s; the kernel shows %+v", what, found)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
