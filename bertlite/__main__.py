from bertlite.cli import main

main()
