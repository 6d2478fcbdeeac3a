// Command backend is the TLS service of the compose file and of the container
// tests. It counts its handshakes and shows them at /counts.
package main

import (
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

type counts struct {
	Full     atomic.Int64
	Resumed  atomic.Int64
	Requests atomic.Int64
}

func main() {
	listen := flag.String("listen", ":9443", "address")
	certificate := flag.String("cert", "/tls/backend.pem", "PEM chain")
	key := flag.String("key", "/tls/backend.key", "PEM private key")
	closeAfter := flag.Int64("close-after", 20, "requests after which a connection is closed; 0: never")
	flag.Parse()
	if err := serve(*listen, *certificate, *key, *closeAfter); err != nil {
		slog.Error("backend stopped", "error", err)
		os.Exit(1)
	}
}

func serve(listen, certificate, key string, closeAfter int64) error {
	seen := new(counts)
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		VerifyConnection: func(state tls.ConnectionState) error {
			if state.DidResume {
				seen.Resumed.Add(1)
			} else {
				seen.Full.Add(1)
			}
			return nil
		},
	}
	server := &http.Server{
		Addr:              listen,
		TLSConfig:         config,
		ReadHeaderTimeout: 10 * time.Second,
		Handler:           handler(seen, closeAfter),
		ConnContext:       withConnectionCount,
		// HTTP/1.1 alone, so that connections end and sessions are resumed.
		Protocols: http1Only(),
	}
	return server.ListenAndServeTLS(certificate, key)
}

func http1Only() *http.Protocols {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return protocols
}

func handler(seen *counts, closeAfter int64) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /counts", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]int64{
			"full": seen.Full.Load(), "resumed": seen.Resumed.Load(), "requests": seen.Requests.Load(),
		})
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		seen.Requests.Add(1)
		if closeAfter > 0 && connectionCount(r).Add(1) >= closeAfter {
			w.Header().Set("Connection", "close")
		}
		host, _ := os.Hostname()
		fmt.Fprintf(w, "Hello from %s, you asked for %s at %s.\n", host, r.URL.Path, r.Host)
	})
	return mux
}
