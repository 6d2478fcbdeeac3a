package probe

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// ticketWait bounds the wait for TLS 1.3 tickets on a connection without a
	// request.
	ticketWait = 300 * time.Millisecond
	// settleWait lets a server finish the handshake before the connection is
	// ended.
	settleWait = 50 * time.Millisecond
	// goneWait bounds the wait for a server that said that it will close.
	goneWait = 500 * time.Millisecond
)

// link is one connection.
type link struct {
	run    *run
	chain  *chain
	target *target
	record *resealv1.ProbeConnection
	wire   *wire
	tc     exchange.TLSConn
	in     *bufio.Reader
	box    *ticketBox
	flight serverFlight
	state  tls.ConnectionState
	done   func() bool // releases the context
	cut    bool        // an answer was not read to its end: to be aborted
}

// connect dials and makes a handshake, offering what c holds. The error is
// errEnough at the bound on connections. The caller ends the link.
func (r *run) connect(ctx context.Context, c *chain, to *target, purpose string) (*link, error) {
	if len(r.report.Connections) >= r.cfg.MaxConnections {
		return nil, errEnough
	}
	if err := r.pause(ctx); err != nil {
		return nil, err
	}
	l := &link{run: r, chain: c, target: to, record: &resealv1.ProbeConnection{
		Number:  uint32(len(r.report.Connections) + 1),
		Address: to.address,
		Purpose: purpose,
		At:      durationpb.New(time.Since(r.started).Round(time.Millisecond)),
	}}
	r.report.Connections = append(r.report.Connections, l.record)
	bounded, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	conn, err := r.cfg.Dial(bounded, "tcp", to.address)
	if err != nil {
		return nil, l.fail(fmt.Errorf("connect to %s: %w", to.address, bare(err)))
	}
	l.wire = &wire{Conn: conn}
	if err := l.handshake(bounded); err != nil {
		l.wire.Close()
		return nil, l.fail(fmt.Errorf("TLS handshake with %s: %w", to.address, err))
	}
	l.done = l.wire.interruptible(ctx)
	l.in = bufio.NewReader(l.tc)
	return l, nil
}

// bare takes the address and the system call out of a network error.
func bare(err error) error {
	var named *net.OpError
	if errors.As(err, &named) && named.Err != nil {
		err = named.Err
	}
	var call *os.SyscallError
	if errors.As(err, &call) {
		err = call.Err
	}
	return err
}

func (l *link) fail(err error) error {
	l.record.Error = cause(err)
	return err
}

func (r *run) pause(ctx context.Context) error {
	if len(r.report.Connections) == 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(r.cfg.Pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *link) handshake(ctx context.Context) error {
	cfg := l.run.base.Clone()
	cfg.NextProtos = l.run.alpn
	if l.chain.version != 0 {
		cfg.MinVersion, cfg.MaxVersion = l.chain.version, l.chain.version
	}
	tc, box, err := l.chain.handshake(ctx, l.wire, cfg)
	sent, got := l.wire.stop()
	var id []byte
	if hello, ok := parseClientHello(sent); ok {
		l.record.Offered, id = hello.offered, hello.sessionID
	}
	l.flight = parseServerFlight(got, id)
	l.record.Answered = l.flight.answered
	if err != nil {
		return err
	}
	l.tc, l.box, l.state = tc, box, tc.ConnectionState()
	l.record.Resumed = l.state.DidResume
	l.chain.completed(l)
	if l.target.facts.Certificate == "" && len(l.state.PeerCertificates) > 0 {
		describeCertificate(l.target.facts, l.state.PeerCertificates[0])
	}
	return nil
}

// offered says whether the ClientHello offered a session.
func (l *link) offered() bool { return offeredKey(l.record.GetOffered()) != "" }

// settle waits until the server has certainly finished the handshake, and for
// its tickets.
func (l *link) settle() {
	wait := settleWait
	if l.chain.version == tls.VersionTLS13 {
		wait = ticketWait
	}
	until := time.Now().Add(wait)
	for time.Now().Before(until) {
		if l.chain.version == tls.VersionTLS13 && len(l.box.came()) > 0 && l.chain.facts.Tickets > 0 {
			return
		}
		_ = l.wire.SetReadDeadline(time.Now().Add(settleWait))
		if _, err := l.in.Peek(1); err == nil || !isTimeout(err) {
			break // it speaks first, or has ended the connection
		}
	}
	_ = l.wire.SetReadDeadline(time.Time{})
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// end ends the connection in a given way and notes what came of it. It returns
// false when the connection can't be ended like that.
func (l *link) end(how resealv1.ProbeEnding) bool {
	defer l.done()
	ok := true
	l.record.Ending = how
	switch how {
	case resealv1.ProbeEnding_PROBE_ENDING_FIN:
		ok = l.wire.finish(l.run.cfg.CloseTimeout)
	case resealv1.ProbeEnding_PROBE_ENDING_RESET, resealv1.ProbeEnding_PROBE_ENDING_ABORT:
		ok = l.wire.reset()
		l.record.Close = resealv1.CloseKind_CLOSE_KIND_RESET_BY_US
	default:
		l.record.Close = l.close()
	}
	if !ok {
		// What can be done with any connection is to close it, which sends FIN.
		l.record.Ending, l.record.Close = resealv1.ProbeEnding_PROBE_ENDING_FIN, 0
	}
	l.chain.collect(l)
	return ok
}

// close sends close_notify, reads on to the peer's end, and closes.
func (l *link) close() resealv1.CloseKind {
	defer l.wire.Close()
	began := time.Now()
	_ = l.wire.SetDeadline(began.Add(l.run.cfg.CloseTimeout))
	finBefore, rstBefore := l.wire.ended()
	sent := l.tc.CloseWrite() == nil
	rest := &io.LimitedReader{R: l.in, N: maxBody}
	_, err := io.Copy(io.Discard, rest)
	fin, rst := l.wire.ended()
	notified := err == nil && rest.N > 0 && !fin && !rst
	if notified {
		_, err = io.Copy(io.Discard, io.LimitReader(onlyReader{l.wire}, maxBody))
		if err == nil {
			l.run.slowest = max(l.run.slowest, time.Since(began))
		}
	}
	switch {
	case notified && sent:
		return resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH
	case rstBefore || rst:
		return resealv1.CloseKind_CLOSE_KIND_RESET_BY_PEER
	case finBefore || fin && !sent:
		return resealv1.CloseKind_CLOSE_KIND_FIN_WITHOUT_NOTIFY
	case fin:
		return resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT
	}
	return resealv1.CloseKind_CLOSE_KIND_TIMEOUT
}

// gone says whether the peer begins to end the connection.
func (l *link) gone() bool {
	_ = l.wire.SetReadDeadline(time.Now().Add(goneWait))
	defer func() { _ = l.wire.SetReadDeadline(time.Time{}) }()
	_, err := l.in.Peek(1)
	return err != nil && !isTimeout(err)
}

func describeCertificate(facts *resealv1.ProbeAddress, leaf *x509.Certificate) {
	sum := sha256.Sum256(leaf.Raw)
	facts.Certificate = hex.EncodeToString(sum[:])
	facts.Subject = leaf.Subject.String()
	facts.ExpiresAt = timestamppb.New(leaf.NotAfter)
	facts.Names = slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		facts.Names = append(facts.Names, ip.String())
	}
}
