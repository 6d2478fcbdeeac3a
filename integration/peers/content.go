package peers

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Paths of the content that backends serve, each where it can.
const (
	// Empty has a body of 0 bytes.
	Empty = "/0"
	// Small has 1 KiB with Content-Length.
	Small = "/1k"
	// Medium has 256 KiB with Content-Length. nginx and openssl don't serve it.
	Medium = "/256k"
	// Large has 10 MiB with Content-Length.
	Large = "/10m"
	// Chunked has 64 KiB without Content-Length.
	Chunked = "/chunked"
	// Trailers has 1 KiB and then the trailer TrailerName: TrailerValue.
	Trailers = "/trailers"
	// NotModified answers 304.
	NotModified = "/304"
	// Early answers EarlyBody before it reads the request body.
	Early = "/early"
	// Echo returns the request body.
	Echo = "/echo"
	// Slow has 1 KiB in eight parts, 50 ms apart where the backend decides.
	Slow = "/slow"
	// Endless is sent until the client ends the connection. Jetty alone serves it.
	Endless = "/endless"
	// Status is followed by /NNN, the status to answer with.
	Status = "/status"
	// Headers returns the request's header as JSON: name to list of values,
	// with "Host".
	Headers = "/headers"
)

// The trailer of Trailers and the body of Early.
const (
	TrailerName  = "X-Reseal-Check"
	TrailerValue = "all-there"
	EarlyBody    = "early\n"
)

// ChunkedSize is the size of Chunked's body.
const ChunkedSize = 64 << 10

// pattern is 10 MiB of lines that hold their own number, so that a lost or
// doubled part shows.
var pattern = sync.OnceValue(func() []byte {
	data := make([]byte, 0, 10<<20)
	for line := 0; len(data) < 10<<20; line++ {
		data = fmt.Appendf(data, "%015d\n", line)
	}
	return data
})

// Body is what a GET of path returns, for Empty, Small, Large, Chunked,
// Trailers, Early and Slow; nil for others. It must not be changed.
func Body(path string) []byte {
	switch path {
	case Empty:
		return []byte{}
	case Small, Trailers, Slow:
		return pattern()[:1<<10]
	case Medium:
		return pattern()[:256<<10]
	case Large:
		return pattern()
	case Chunked:
		return pattern()[:ChunkedSize]
	case Early:
		return []byte(EarlyBody)
	}
	return nil
}

// Handler serves all of the content.
func Handler(closeEach bool) http.Handler {
	mux := http.NewServeMux()
	fixed := func(w http.ResponseWriter, r *http.Request) {
		body := Body(r.URL.Path)
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body)
	}
	mux.HandleFunc(Empty, fixed)
	mux.HandleFunc(Small, fixed)
	mux.HandleFunc(Medium, fixed)
	mux.HandleFunc(Large, fixed)
	mux.HandleFunc(Early, func(w http.ResponseWriter, r *http.Request) {
		// An HTTP/1 server reads on before it writes unless told otherwise.
		_ = http.NewResponseController(w).EnableFullDuplex()
		fixed(w, r)
		_ = http.NewResponseController(w).Flush()
	})
	mux.HandleFunc(Chunked, func(w http.ResponseWriter, _ *http.Request) { parts(w, Body(Chunked), 8, 0) })
	mux.HandleFunc(Slow, func(w http.ResponseWriter, _ *http.Request) { parts(w, Body(Slow), 8, 50*time.Millisecond) })
	mux.HandleFunc(Trailers, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", TrailerName)
		parts(w, Body(Trailers), 1, 0)
		w.Header().Set(TrailerName, TrailerValue)
	})
	mux.HandleFunc(NotModified, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("ETag", `"1"`)
		w.WriteHeader(http.StatusNotModified)
	})
	mux.HandleFunc(Echo, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength >= 0 {
			w.Header().Set("Content-Length", strconv.FormatInt(r.ContentLength, 10))
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body)
	})
	mux.HandleFunc(Status+"/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 599 {
			code = http.StatusBadRequest
		}
		w.WriteHeader(code)
	})
	mux.HandleFunc(Headers, func(w http.ResponseWriter, r *http.Request) {
		header := r.Header.Clone()
		header.Set("Host", r.Host)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(header)
	})
	if !closeEach {
		return mux
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		mux.ServeHTTP(w, r)
	})
}

// all are the paths that Handler serves.
func all() map[string]bool {
	return has(Empty, Small, Large, Chunked, Trailers, NotModified, Early, Echo, Slow, Status, Headers)
}

// parts writes body in n flushed parts with a pause between them.
func parts(w http.ResponseWriter, body []byte, n int, pause time.Duration) {
	w.Header().Set("Content-Type", "text/plain")
	size := len(body) / n
	for i := range n {
		if i > 0 && pause > 0 {
			time.Sleep(pause)
		}
		end := (i + 1) * size
		if i == n-1 {
			end = len(body)
		}
		if _, err := w.Write(body[i*size : end]); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
	}
}
