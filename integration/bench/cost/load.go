package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/process"
)

// clients are the connections of most workloads.
const clients = 32

// clientTimeout bounds everything that one client waits for.
const clientTimeout = time.Minute

// loadTimeout bounds one run of h2load, which itself waits for ever.
const loadTimeout = 2 * time.Minute

var h2loadDone = regexp.MustCompile(`requests: (\d+) total, \d+ started, \d+ done, (\d+) succeeded`)

// h2load makes n requests with h2load, which has to get that many good answers.
func h2load(ctx context.Context, address string, n int, path string, args ...string) error {
	program, err := process.Find("h2load", "")
	if err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	args = append(args, "-n", strconv.Itoa(n), "--groups=X25519", "--connect-to="+address, "https://"+harness.SiteName+":"+port+path)
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	output, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("h2load %s: %w\n%s", strings.Join(args, " "), err, output)
	}
	if done := h2loadDone.FindSubmatch(output); done == nil || string(done[1]) != string(done[2]) {
		return fmt.Errorf("h2load %s: not all requests succeeded:\n%s", strings.Join(args, " "), output)
	}
	return nil
}

// client is one HTTP/1.1 connection. It is used by one goroutine.
type client struct {
	conn   *tls.Conn
	reader *bufio.Reader
}

// connect opens a connection to a proxy.
func connect(ctx context.Context, address string, config *tls.Config) (*client, error) {
	socket, err := (&net.Dialer{Timeout: clientTimeout}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(socket, config)
	_ = conn.SetDeadline(time.Now().Add(clientTimeout))
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	return &client{conn: conn, reader: bufio.NewReaderSize(conn, 4<<10)}, nil
}

// request asks for path by GET, as host.
func request(host, path string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: reseal-bench\r\n\r\n", path, host)
}

// get makes a request and reads the answer, which must be 200 with a
// Content-Length.
func (c *client) get(request []byte) error {
	_ = c.conn.SetDeadline(time.Now().Add(clientTimeout))
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	status, length := []byte(nil), -1
	for {
		line, err := c.reader.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimRight(line, "\r\n")
		if status == nil {
			status = bytes.Clone(line)
			if !bytes.HasPrefix(status, []byte("HTTP/1.1 200")) {
				return fmt.Errorf("answer %q", status)
			}
			continue
		}
		if len(line) == 0 {
			break
		}
		if name, value, _ := bytes.Cut(line, []byte(":")); bytes.EqualFold(name, []byte("content-length")) {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return errors.New("an answer without a length")
	}
	_, err := c.reader.Discard(length)
	return err
}

// close ends the connection cleanly.
func (c *client) close() { _ = c.conn.Close() }

// crowd opens n connections, each of which has made a request when it returns.
func crowd(ctx context.Context, address string, config *tls.Config, n int, request []byte) (all []*client, err error) {
	all = make([]*client, n)
	err = share(ctx, clients, n, func(_, i int) error {
		c, err := connect(ctx, address, config)
		if err != nil {
			return err
		}
		all[i] = c
		return c.get(request)
	})
	return all, err
}

func disperse(all []*client) {
	for _, c := range all {
		if c != nil {
			c.close()
		}
	}
}

// share lets workers do n things, and ends with the first error.
func share(ctx context.Context, workers, n int, do func(worker, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var running sync.WaitGroup
	for worker := range workers {
		running.Go(func() {
			for i := next.Add(1); i <= int64(n) && ctx.Err() == nil; i = next.Add(1) {
				if err := do(worker, int(i-1)); err != nil {
					cancel(err)
				}
			}
		})
	}
	running.Wait()
	return context.Cause(ctx)
}

// visits makes n connections with one request each. With resumed, all of them must
// resume, from a ticket that each worker got before; without, none may.
func (b *bed) visits(ctx context.Context, address string, version uint16, resumed bool) (func(n int) error, error) {
	const workers = 16
	text := request(harness.SiteName, small)
	configs := make([]*tls.Config, workers)
	for i := range configs {
		configs[i] = b.tls()
		configs[i].MinVersion, configs[i].MaxVersion = version, version
		if !resumed {
			continue
		}
		configs[i].ClientSessionCache = tls.NewLRUClientSessionCache(1)
		c, err := connect(ctx, address, configs[i])
		if err != nil {
			return nil, err
		}
		if err := c.get(text); err != nil {
			return nil, err
		}
		c.close()
	}
	return func(n int) error {
		return share(ctx, workers, n, func(worker, _ int) error {
			c, err := connect(ctx, address, configs[worker])
			if err != nil {
				return err
			}
			defer c.close()
			if c.conn.ConnectionState().DidResume != resumed {
				return fmt.Errorf("a connection was resumed: %v, want %v", !resumed, resumed)
			}
			return c.get(text)
		})
	}, nil
}

// saturate is the rate that a proxy serves when all clients ask again at once.
func saturate(ctx context.Context, all []*client, request []byte, n int) (perSecond float64, err error) {
	begin := time.Now()
	err = share(ctx, len(all), n, func(worker, _ int) error { return all[worker].get(request) })
	return float64(n) / time.Since(begin).Seconds(), err
}

// pace makes n requests at a steady rate, whatever becomes of them, and returns how
// long they took from the time at which they were due.
func pace(ctx context.Context, all []*client, request []byte, n int, perSecond float64) ([]time.Duration, error) {
	due := make(chan time.Time, n) // a client that is late finds what it missed
	begin := time.Now()
	go func() {
		defer close(due)
		for i := range n {
			at := begin.Add(time.Duration(float64(i) / perSecond * float64(time.Second)))
			if wait := time.Until(at); wait > 0 {
				time.Sleep(wait)
			}
			due <- at
		}
	}()
	var mu sync.Mutex
	var took []time.Duration
	var running sync.WaitGroup
	var failed error
	for _, c := range all {
		running.Go(func() {
			var own []time.Duration
			var err error
			for at := range due {
				if err == nil && ctx.Err() == nil {
					err = c.get(request)
					own = append(own, time.Since(at))
				}
			}
			mu.Lock()
			defer mu.Unlock()
			took, failed = append(took, own...), errors.Join(failed, err)
		})
	}
	running.Wait()
	slices.Sort(took)
	return took, errors.Join(failed, ctx.Err())
}

// quantile of sorted durations.
func quantile(sorted []time.Duration, percent int) time.Duration {
	return sorted[(len(sorted)*percent+99)/100-1]
}

// pss is the proportional share of memory of processes, in bytes.
func pss(pids []int) (int64, error) {
	var sum int64
	for _, pid := range pids {
		file, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
		text, err := io.ReadAll(file)
		if err = errors.Join(err, file.Close()); err != nil {
			return 0, err
		}
		_, line, _ := bytes.Cut(text, []byte("\nPss:"))
		var kilobytes int64
		if _, err := fmt.Sscan(string(line), &kilobytes); err != nil {
			return 0, fmt.Errorf("/proc/%d/smaps_rollup: %w", pid, err)
		}
		sum += kilobytes << 10
	}
	return sum, nil
}
