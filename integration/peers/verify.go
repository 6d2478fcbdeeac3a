package peers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Verify asks base (scheme and host) for all of the content that b serves and
// returns what differs from what it should be. It may be pointed at b itself or
// at a proxy in front of it.
func Verify(ctx context.Context, client *http.Client, base string, b *Backend) error {
	v := verifier{ctx: ctx, client: client, base: base}
	steps := []struct {
		path  string
		check func() error
	}{
		{Empty, v.get(Empty)},
		{Small, v.get(Small)},
		{Large, v.get(Large)},
		{Chunked, v.get(Chunked)},
		{Slow, v.get(Slow)},
		{Trailers, v.trailers},
		{NotModified, v.notModified},
		{Early, v.early},
		{Echo, v.echo},
		{Headers, v.headers},
		{Status, v.statuses},
	}
	var all []error
	for _, step := range steps {
		if !b.Serves(step.path) {
			continue
		}
		if err := step.check(); err != nil {
			all = append(all, fmt.Errorf("%s: %w", step.path, err))
		}
	}
	// s_server supports only GET; it is the one without Status.
	if b.Serves(Status) {
		for _, path := range []string{Empty, Small, Large} {
			if err := v.head(path); err != nil {
				all = append(all, fmt.Errorf("HEAD %s: %w", path, err))
			}
		}
	}
	if err := v.slowReader(); err != nil {
		all = append(all, fmt.Errorf("%s read slowly: %w", Large, err))
	}
	return errors.Join(all...)
}

type verifier struct {
	ctx    context.Context
	client *http.Client
	base   string
}

func (v verifier) do(method, path string, body io.Reader) (*http.Response, error) {
	request, err := http.NewRequestWithContext(v.ctx, method, v.base+path, body)
	if err != nil {
		return nil, err
	}
	request.Header.Set("X-Check", "one")
	return v.client.Do(request)
}

// body reads a response that should be 200 with a body.
func body(response *http.Response, want []byte) error {
	defer func() { _ = response.Body.Close() }()
	got, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", len(got), len(want), err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s: %.200q", response.Status, got)
	}
	return same(got, want)
}

func same(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	return fmt.Errorf("body of %d bytes, want %d; they differ from byte %d on", len(got), len(want), at)
}

func (v verifier) get(path string) func() error {
	return func() error {
		response, err := v.do(http.MethodGet, path, nil)
		if err != nil {
			return err
		}
		return body(response, Body(path))
	}
}

func (v verifier) trailers() error {
	response, err := v.do(http.MethodGet, Trailers, nil)
	if err != nil {
		return err
	}
	if err := body(response, Body(Trailers)); err != nil {
		return err
	}
	if got := response.Trailer.Get(TrailerName); got != TrailerValue {
		return fmt.Errorf("trailer %s is %q, want %q", TrailerName, got, TrailerValue)
	}
	return nil
}

func (v verifier) notModified() error {
	response, err := v.do(http.MethodGet, NotModified, nil)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	got, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusNotModified || len(got) != 0 {
		return fmt.Errorf("status %s with %d bytes, want 304 without", response.Status, len(got))
	}
	return nil
}

func (v verifier) head(path string) error {
	response, err := v.do(http.MethodHead, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	got, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK || len(got) != 0 || response.ContentLength != int64(len(Body(path))) {
		return fmt.Errorf("status %s, Content-Length %d, %d bytes; want 200, %d, 0", response.Status, response.ContentLength, len(got), len(Body(path)))
	}
	return nil
}

// early sends half of a body, reads the whole answer, and only then goes on.
func (v verifier) early() error {
	reader, writer := io.Pipe()
	// net/http waits for a blocked Read of the body before it returns an error.
	bound := time.AfterFunc(15*time.Second, func() { _ = writer.CloseWithError(errors.New("no answer within 15 s")) })
	defer bound.Stop()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = writer.Write(Body(Small))
	}()
	defer func() {
		_ = writer.Close()
		_ = reader.Close()
		<-sent
	}()
	response, err := v.do(http.MethodPost, Early, reader)
	if err != nil {
		return err
	}
	return body(response, []byte(EarlyBody))
}

func (v verifier) echo() error {
	for _, size := range []int{0, 1, 1 << 10, 1 << 20} {
		want := Body(Large)[:size]
		// With and without Content-Length.
		for _, reader := range []io.Reader{bytes.NewReader(want), struct{ io.Reader }{bytes.NewReader(want)}} {
			response, err := v.do(http.MethodPost, Echo, reader)
			if err != nil {
				return fmt.Errorf("%d bytes: %w", size, err)
			}
			if err := body(response, want); err != nil {
				return fmt.Errorf("%d bytes: %w", size, err)
			}
		}
	}
	return nil
}

func (v verifier) headers() error {
	response, err := v.do(http.MethodGet, Headers, nil)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	var raw map[string][]string
	if err := json.NewDecoder(response.Body).Decode(&raw); err != nil {
		return err
	}
	got := make(http.Header)
	for name, values := range raw {
		got[http.CanonicalHeaderKey(name)] = values
	}
	if check := got.Values("X-Check"); len(check) != 1 || check[0] != "one" {
		return fmt.Errorf("the backend saw X-Check %q, want one value \"one\"; all it saw: %v", check, got)
	}
	return nil
}

func (v verifier) statuses() error {
	for _, code := range []int{204, 400, 404, 500} {
		response, err := v.do(http.MethodGet, fmt.Sprintf("%s/%d", Status, code), nil)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		if err != nil {
			return fmt.Errorf("status %d: %w", code, err)
		}
		if response.StatusCode != code {
			return fmt.Errorf("status %s, want %d", response.Status, code)
		}
	}
	return nil
}

// slowReader takes the large body in small parts with pauses in between, so
// that every buffer on the way fills up.
func (v verifier) slowReader() error {
	response, err := v.do(http.MethodGet, Large, nil)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	got := make([]byte, 0, len(Body(Large)))
	part := make([]byte, 512<<10)
	for {
		n, err := io.ReadFull(response.Body, part)
		got = append(got, part[:n]...)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) && int64(len(got)) == int64(len(Body(Large))) {
			return same(got, Body(Large))
		}
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", len(got), err)
		}
		time.Sleep(15 * time.Millisecond)
	}
}
