package integration

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// visitors are what clients do while their edge is upgraded. Nothing of it may fail.
type visitors struct {
	stage  *upgradeStage
	ctx    context.Context
	all    sync.WaitGroup
	done   atomic.Int64
	failed atomic.Int64

	mu    sync.Mutex
	first []string // of what failed
}

func (f *visitors) went(what string, err error) {
	if err == nil {
		f.done.Add(1)
		return
	}
	f.failed.Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.first) < 10 {
		f.first = append(f.first, what+": "+err.Error())
	}
}

// repeat calls do again and again, and every at most, until the traffic ends.
func (f *visitors) repeat(what string, every time.Duration, do func() error) {
	f.all.Go(func() {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for f.ctx.Err() == nil {
			f.went(what, do())
			select {
			case <-ticker.C:
			case <-f.ctx.Done():
			}
		}
	})
}

func fetch(client *http.Client, path string, want int64) error {
	response, err := client.Get("https://" + harness.SiteName + path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	switch {
	case err != nil:
		return fmt.Errorf("after %d bytes: %w", n, err)
	case response.StatusCode != http.StatusOK || want >= 0 && n != want:
		return fmt.Errorf("%s, %d bytes", response.Status, n)
	}
	return nil
}

// visit connects with a ticket, again and again, and fails if that is not taken.
func (f *visitors) visit() {
	config := f.stage.ClientTLS()
	config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	first := true
	f.repeat("a visit with a ticket", 20*time.Millisecond, func() error {
		conn, err := tls.Dial("tcp", f.stage.address, config)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET "+peers.Small+" HTTP/1.1\r\nHost: "+harness.SiteName+"\r\nConnection: close\r\n\r\n"); err != nil {
			return err
		}
		if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
			return fmt.Errorf("%.40q: %w", answer, err)
		}
		if !first && !conn.ConnectionState().DidResume {
			return errors.New("the ticket was declined")
		}
		first = false
		return nil
	})
}

// conversation is a WebSocket that speaks for some seconds.
func (f *visitors) conversation() error {
	config, err := websocket.NewConfig("wss://"+harness.SiteName+"/socket", "https://"+harness.SiteName)
	if err != nil {
		return err
	}
	secure := f.stage.ClientTLS()
	secure.NextProtos = []string{"http/1.1"}
	conn, err := tls.Dial("tcp", f.stage.address, secure)
	if err != nil {
		return err
	}
	socket, err := websocket.NewClient(config, conn)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer socket.Close()
	for i := range 30 {
		text, answer := strconv.Itoa(i), ""
		_ = socket.SetDeadline(time.Now().Add(20 * time.Second))
		if err := websocket.Message.Send(socket, text); err != nil {
			return err
		}
		if err := websocket.Message.Receive(socket, &answer); err != nil || answer != text {
			return fmt.Errorf("%q in place of %q: %w", answer, text, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil
}

// streamed is a call of two directions, as gRPC makes: HTTP/2, messages both ways, and
// trailers at the end.
func streamed(client *http.Client) error {
	reader, writer := io.Pipe()
	request, err := http.NewRequest(http.MethodPost, "https://"+harness.SiteName+"/stream", reader)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("Te", "trailers")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	var echo [5]byte
	for range 30 {
		if _, err := io.WriteString(writer, "hello"); err != nil {
			return err
		}
		if _, err := io.ReadFull(response.Body, echo[:]); err != nil || string(echo[:]) != "hello" {
			return fmt.Errorf("%q: %w", echo, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	_ = writer.Close()
	if rest, err := io.ReadAll(response.Body); err != nil || len(rest) > 0 {
		return fmt.Errorf("%q: %w", rest, err)
	}
	if response.Trailer.Get("Grpc-Status") != "0" {
		return fmt.Errorf("trailers %v", response.Trailer)
	}
	return nil
}

const downloadSize = 300 * 1000

// upgradeContent serves what the traffic asks for.
func upgradeContent() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", peers.Handler(false))
	mux.Handle("/socket", websocket.Handler(func(socket *websocket.Conn) { _, _ = io.Copy(socket, socket) }))
	mux.HandleFunc("/download", func(w http.ResponseWriter, _ *http.Request) {
		for range 30 {
			_, _ = w.Write(make([]byte, downloadSize/30))
			_ = http.NewResponseController(w).Flush()
			time.Sleep(100 * time.Millisecond)
		}
	})
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		control := http.NewResponseController(w)
		_ = control.EnableFullDuplex()
		_ = control.Flush()
		data := make([]byte, 5)
		for {
			if _, err := io.ReadFull(r.Body, data); err != nil {
				break
			}
			_, _ = w.Write(data)
			_ = control.Flush()
		}
		w.Header().Set("Grpc-Status", "0")
	})
	return mux
}

// TestUpgradeUnderLoad upgrades an edge again and again, under requests of HTTP/1.1 and
// HTTP/2, fresh connections with tickets, long downloads, WebSockets and gRPC's kind of
// streams. Nothing fails, no ticket is declined, no counter goes back, and no upgrade
// costs the backend a full handshake. Its long form makes 20 upgrades under 2,000
// requests a second.
func TestUpgradeUnderLoad(t *testing.T) {
	upgrades, perSecond := 3, 300
	if harness.Long() {
		upgrades, perSecond = 20, 2000
	}
	if text := os.Getenv("RESEAL_UPGRADE_RATE"); text != "" {
		perSecond, _ = strconv.Atoi(text)
	}
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("backend of HTTP/2 %t", h2), func(t *testing.T) { upgradeUnderLoad(t, h2, upgrades, perSecond) })
	}
}

func upgradeUnderLoad(t *testing.T, h2 bool, upgrades, perSecond int) {
	w := newWorldOf(t, harness.NewShipped(t))
	backend := w.Launch(t, func(_ context.Context, o peers.Options) (*peers.Backend, error) {
		return peers.GoWith(o, upgradeContent())
	}, peers.Options{HTTP2: h2})
	s := newUpgradeStage(t, backend, w)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f := &visitors{stage: s, ctx: ctx}
	const clients = 20
	for i := range clients {
		client := s.Client(t, s.address, i%2 == 0)
		f.repeat("a request", time.Second*clients/time.Duration(perSecond), func() error { return fetch(client, peers.Small, -1) })
	}
	for i := range 4 {
		http2 := s.Client(t, s.address, i%2 == 0)
		f.repeat("a download", time.Millisecond, func() error { return fetch(http2, "/download", downloadSize) })
		f.repeat("a WebSocket", time.Millisecond, f.conversation)
		if h2 {
			client := s.Client(t, s.address, true)
			f.repeat("a stream", time.Millisecond, func() error { return streamed(client) })
		}
	}
	f.visit()
	time.Sleep(2 * time.Second)
	before, requests := countsOf(t, backend), int64(0)
	for n := range upgrades {
		old, err := s.edge.State()
		if err != nil {
			t.Fatal(err)
		}
		now := s.edge.Upgrade()
		t.Logf("upgrade %d: process %d took over from %d", n+1, now.PID, old.PID)
		counted := s.requestsOf(t)
		if counted < requests {
			t.Errorf("the edge has counted %d requests, and %d before", counted, requests)
		}
		requests = counted
		time.Sleep(2 * time.Second)
	}
	cancel()
	f.all.Wait()
	after := countsOf(t, backend)
	t.Logf("%d went well, %d failed; the backend made %d full handshakes during %d upgrades, of %d connections",
		f.done.Load(), f.failed.Load(), after.Full-before.Full, upgrades, after.Connections-before.Connections)
	for _, failure := range f.first {
		t.Error(failure)
	}
	if after.Full-before.Full > 1 {
		t.Errorf("%d full handshakes", after.Full-before.Full)
	}
	s.refusesNothing(t)
	harness.Settle(t, func() error {
		state, err := s.edge.State()
		if err == nil && state.Predecessor != nil {
			err = fmt.Errorf("process %d still drains", state.Predecessor.PID)
		}
		return err
	})
	// Every request that the backend has seen is counted, whichever process had it.
	if counted := s.requestsOf(t); counted != after.Requests {
		t.Errorf("the edge has counted %d requests, the backend %d", counted, after.Requests)
	}
}

// requestsOf is what the admin page counts of requests to the backend.
func (s *upgradeStage) requestsOf(t *testing.T) int64 {
	t.Helper()
	return int64(s.edge.Metrics().Sum("reseal_backend_requests_total"))
}

// refusesNothing connects: the edge listens still.
func (s *upgradeStage) refusesNothing(t *testing.T) {
	t.Helper()
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}
