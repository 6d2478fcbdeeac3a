package frontend

import (
	"crypto/rand"
	"crypto/tls"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// rusageThread is RUSAGE_THREAD of getrusage(2).
const rusageThread = 1

// threadTime is the CPU time of the calling thread.
func threadTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(rusageThread, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkResumedTLS13 compares a resumed handshake with that of a server that
// only calls SetSessionTicketKeys, one of each in turn, so that a noisy machine
// treats both alike. The CPU times are those of the server's side; ns/op and
// allocations are of both servers and clients. It takes some 10,000 handshakes
// (-benchtime 10000x) for a ratio that holds to a percent.
func BenchmarkResumedTLS13(b *testing.B) {
	cert, _ := selfSigned(b, "app.test")
	base := &tls.Config{Certificates: []tls.Certificate{cert}}
	reference := base.Clone()
	var key [32]byte
	_, _ = rand.Read(key[:])
	reference.SetSessionTicketKeys([][32]byte{key})

	l := exchange.Listener{Name: "main", PolicyKey: "p", TLS: base, TicketLifetime: time.Hour}
	keys := newKeys(b, ring("default", epoch(1, epochActive)))
	a := newAcceptor(keys.source, l)
	shared := &tls.Config{SessionTicketsDisabled: true, GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		return a.policy.handshake().config(a.tls, hello), nil
	}}

	server := newBenchServer()
	defer close(server.ready)
	legs := []*benchLeg{newBenchLeg(b, server, reference), newBenchLeg(b, server, shared)}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		legs[i%2].handshake(b)
		legs[1-i%2].handshake(b)
	}
	perOp := func(leg *benchLeg) float64 { return float64(leg.spent) / float64(b.N) }
	b.ReportMetric(perOp(legs[0]), "SetSessionTicketKeys-cpu-ns/op")
	b.ReportMetric(perOp(legs[1]), "keyring-cpu-ns/op")
	b.ReportMetric(perOp(legs[1])/perOp(legs[0]), "ratio")
}

// benchServer makes the server's side of handshakes on a thread of its own.
type benchServer struct {
	ready   chan *tls.Conn
	results chan benchResult
}

type benchResult struct {
	spent time.Duration
	err   error
}

func newBenchServer() *benchServer {
	s := &benchServer{ready: make(chan *tls.Conn), results: make(chan benchResult)}
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for conn := range s.ready {
			began := threadTime()
			err := conn.Handshake()
			spent := threadTime() - began
			_, _ = conn.Write([]byte("x"))
			s.results <- benchResult{spent, err}
		}
	}()
	return s
}

// benchLeg is one way to handle tickets, with its client.
type benchLeg struct {
	server *benchServer
	config *tls.Config
	client *tls.Config
	spent  time.Duration
}

// newBenchLeg makes a full handshake, from which the others resume.
func newBenchLeg(b *testing.B, server *benchServer, config *tls.Config) *benchLeg {
	leg := &benchLeg{server: server, config: config, client: clientConfig("app.test", tls.VersionTLS13, &oneCache{})}
	leg.connect(b)
	leg.spent = 0
	return leg
}

func (l *benchLeg) handshake(b *testing.B) {
	if !l.connect(b).DidResume {
		b.Fatal("not resumed")
	}
}

func (l *benchLeg) connect(b *testing.B) tls.ConnectionState {
	ours, theirs := bufferedPipe()
	defer ours.Close()
	defer theirs.Close()
	accepted := tls.Server(theirs, l.config)
	l.server.ready <- accepted
	if _, err := tls.Client(ours, l.client).Read(make([]byte, 1)); err != nil {
		b.Fatal(err)
	}
	result := <-l.server.results
	if result.err != nil {
		b.Fatal(result.err)
	}
	l.spent += result.spent
	return accepted.ConnectionState()
}
